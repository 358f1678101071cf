"""A static key/value cache in which every row has its own length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from spec_rollout.engine.kept_slot import KeptSlot, Put
from spec_rollout.engine.recurrent import RecurrentPass, RecurrentStates

EXTENT_STEP = 32
"""Attention reads a multiple of this many entries: few shapes occur, and in bfloat16 a CPU's sums over fewer than 32
come out otherwise."""


class SlotCache:
    """Keys and values of `slots` rows of up to `capacity` tokens, per attention layer [slots, heads, capacity,
    head_dim], and the `states` of the recurrent layers. Both sizes follow what rows need (`resize`). What one head
    reads lies in one piece: with the heads of a token side by side, a CPU takes twice as long for long rows.

    A forward pass writes and reads them through a `SlotWindow`. Rolling keys and values back needs nothing here:
    entries beyond a row's committed length are masked by the caller and overwritten later. The recurrent layers follow
    the tokens that `commit` keeps.
    """

    first = 0
    """Entry of a slot's first token."""

    def __init__(self):
        self.release()

    def release(self) -> None:
        """Give the memory back, as after a rollout, or after a pass that failed half-way."""
        self.slots = self.capacity = 0
        self.kind: object = None
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.views: dict[Any, Any] = {}
        """What passes have made of the buffers for themselves. It goes before these do, whose memory it would hold."""
        self.states = RecurrentStates()
        self.begun = False

    def allocate(self, slots: int, capacity: int, kind: object = None) -> None:
        """Make room for `slots` rows of `capacity` tokens, of what `kind` says (such as dtype and device), for one
        rollout. The first pass makes the buffers."""
        self.release()
        self.slots, self.capacity, self.kind = slots, capacity, kind
        self.states.allocate(slots)

    def resize(self, slots: int, capacity: int, kept: int, puts: Sequence[Put] = ()) -> None:
        """From here on there are `slots` of `capacity` tokens; the first `kept` slots keep what they hold, and others
        take over `puts`, whose memory goes meanwhile. One layer after the other, so that little is there twice."""
        self.slots, self.capacity = slots, capacity
        self.views.clear()
        for buffers, parts in ((self.keys, [p.kept.keys for p in puts]), (self.values, [p.kept.values for p in puts])):
            for layer in range(max(len(each) for each in (buffers, *parts))):
                if layer < len(buffers):
                    buffers[layer] = resized(buffers[layer], slots, capacity, kept, dim=2)
                self._fill(buffers, layer, puts, parts)
                for part in parts:
                    part[layer] = part[layer][:, :0].clone()  # a view would hold the memory
        self.states.resize(slots, kept)

    def _fill(self, buffers: list[Tensor], layer: int, puts: Sequence[Put], parts: Sequence[list[Tensor]]) -> None:
        """Write `parts` of `puts` to a layer's buffer, which is made like a pass makes it if it is missing."""
        for put, part in zip(puts, parts, strict=True):
            if layer == len(buffers):
                heads, _, size = part[layer].shape
                buffers.append(part[layer].new_zeros(self.slots, heads, self.capacity, size))
            place = slice(self.first, self.first + put.tokens)
            buffers[layer][put.slot, :, place] = part[layer][:, : put.tokens]
            self.begun = True

    def extent(self, tokens: int) -> int:
        """How many entries a pass over rows of at most `tokens` tokens reads."""
        return min(rounded_up(tokens), self.capacity)

    @property
    def buffers(self) -> list[Tensor]:
        return [*self.keys, *self.values, *self.states.buffers]

    def window(self, start: int, positions: Tensor, extent: int, lengths: Tensor | None = None) -> SlotWindow:
        """For a forward pass that writes slots start..start + N - 1 at `positions` [N, T] and attends to the first
        `extent` entries of each. With `lengths` [N] it is a prefill: row n has the first lengths[n] of the tokens."""
        rows = slice(start, start + positions.shape[0])
        recurrent = RecurrentPass(self.states, rows, positions.shape[1], lengths)
        first, self.begun = not self.begun, True
        size = (self.slots, self.capacity)
        return SlotWindow(self.keys, self.values, size, start, positions, extent, recurrent, renew=first)

    def clear(self, slots: tuple[int, int]) -> None:
        """New rows sit in slots[0]..slots[1] - 1; what their slots held is not theirs."""
        self.states.clear(slots)

    def commit(self, tokens: Tensor) -> None:
        """Of the tokens that the last pass read, row n keeps the first `tokens` [N]."""
        self.states.commit(tokens)

    def clear_beyond(self, length: Tensor) -> None:
        """Clear what the slots 0..N - 1 hold at and beyond their `length` [N]. For the rare pass that left NaN there:
        masked entries weigh nothing, but nothing times NaN is NaN."""
        stale = torch.arange(self.capacity, device=length.device) >= length[:, None]
        for buffer in (*self.keys, *self.values):
            buffer[: len(length)].masked_fill_(stale[:, None, :, None], 0)

    def copy(self, source: Tensor, target: Tensor, extent: int) -> None:
        """Slots `target` [N] take over the first `extent` entries of slots `source` [N], and the recurrent states."""
        for buffer in (*self.keys, *self.values):
            buffer[target, :, :extent] = buffer[source, :, :extent]
        self.states.copy(source, target)

    def keep(self, slot: int, tokens: int) -> KeptSlot:
        """What `slot` holds of its first `tokens` tokens; its states are those behind them."""
        place = slice(self.first, self.first + tokens)
        keys, values = ([buffer[slot, :, place].clone() for buffer in b] for b in (self.keys, self.values))
        return KeptSlot(tokens, keys, values, *self.states.keep(slot))

    def put(self, puts: Sequence[Put]) -> None:
        """Slots take over keys and values of `puts`."""
        for buffers, parts in ((self.keys, [p.kept.keys for p in puts]), (self.values, [p.kept.values for p in puts])):
            for layer in range(max(map(len, parts), default=0)):
                self._fill(buffers, layer, puts, parts)

    def leave(self, gone: Sequence[tuple[int, int]], stay: Sequence[int]) -> list[KeptSlot]:
        """What the slots of `gone`, (slot, tokens) each, hold, as in `keep`. From here on there are the slots `stay`
        alone, in that order. One layer after the other, as in `resize`."""
        found = [KeptSlot(tokens, [], [], *self.states.keep(slot)) for slot, tokens in gone]
        self.views.clear()
        for buffers, name in ((self.keys, "keys"), (self.values, "values")):
            for layer, buffer in enumerate(buffers):
                for part, (slot, tokens) in zip(found, gone, strict=True):
                    getattr(part, name).append(buffer[slot, :, self.first : self.first + tokens].clone())
                buffers[layer] = buffer[list(stay)]
                del buffer
        self.slots = len(stay)
        self.states.choose(stay)
        return found


class SlotWindow(Cache):
    """What one forward pass sees of a slot cache: a model's attention layers call `update` as they do with any
    transformers cache. The first pass through a layer makes its buffers, of `size` (slots, capacity); with `renew`
    also where they are of another dtype. Attention layers are counted as they come, so that none is kept for a layer
    of another kind. Recurrent layers find a cache that is always empty: what they need stands in front of the inputs
    that `update_conv_state` returns, and in `recurrent`."""

    def __init__(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        size: tuple[int, int],
        start: int,
        positions: Tensor,
        extent: int,
        recurrent: RecurrentPass | None = None,
        renew: bool = False,
    ):
        super().__init__(layers=[])
        self.recurrent, self._places = recurrent, {}
        self.keys, self.values, self.size, self.renew = keys, values, size, renew
        self._positions = positions
        self._index: dict[int, Tensor] = {}
        """By the number of heads."""
        self._rows, self.extent = slice(start, start + positions.shape[0]), extent

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Write [N, heads, T, head_dim] keys and values; return the window's [N, heads, extent, head_dim]."""
        place = self._places.setdefault(layer_idx, len(self._places))
        if place == len(self.keys):
            made = self._make(key_states), self._make(value_states)  # both or, where memory runs out, neither
            self.keys.append(made[0])
            self.values.append(made[1])
        elif self.renew:
            for buffers, states in ((self.keys, key_states), (self.values, value_states)):
                if buffers[place].dtype != states.dtype:
                    buffers[place] = self._make(states)
        return self._write(self.keys[place], key_states), self._write(self.values[place], value_states)

    def _make(self, states: Tensor) -> Tensor:
        _, heads, _, head_dim = states.shape
        return states.new_zeros(self.size[0], heads, self.size[1], head_dim)

    def _write(self, buffer: Tensor, states: Tensor) -> Tensor:
        flat = buffer.view(-1, buffer.shape[-1])
        flat.index_copy_(0, self._flat(buffer.shape[1]), states.reshape(-1, states.shape[-1]).to(flat.dtype))
        return buffer[self._rows, :, : self.extent].to(states.dtype)

    def _flat(self, heads: int) -> Tensor:
        """Where the tokens lie in a buffer that is seen as [slots · heads · capacity, D]: [N · heads · T]."""
        found = self._index.get(heads)
        if found is None:
            rows, device = self._rows, self._positions.device
            first = torch.arange(rows.start * heads, rows.stop * heads, device=device) * self.size[1]
            found = self._index[heads] = (first.view(-1, heads, 1) + self._positions[:, None]).flatten()
        return found

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int, **kwargs
    ) -> Tensor:
        """Inputs [N, C, T] of a convolution; returns them behind those of the tokens before, [N, C, K - 1 + T]."""
        return self.recurrent.convolve(conv_states, (layer_idx, state_idx), conv_kernel_size)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, **kwargs) -> Tensor:
        """Nothing to do: the recurrence itself has kept its state, where the row's tokens end."""
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are given with every forward pass, never counted from the cache."""
        return 0

    def __len__(self) -> int:
        return len(self.keys)


def resized(buffer: Tensor, slots: int, capacity: int, kept: int, dim: int = 1) -> Tensor:
    """`buffer` [S, C, …] as [slots, capacity, …] with the first `kept` rows of it; 0 where nothing was, since what is
    masked still counts where it is NaN. `dim` is where C stands."""
    larger = buffer.new_empty(slots, *buffer.shape[1:dim], capacity, *buffer.shape[dim + 1 :])
    shared = min(capacity, buffer.shape[dim])
    larger[:kept].narrow(dim, 0, shared).copy_(buffer[:kept].narrow(dim, 0, shared))
    larger[:kept].narrow(dim, shared, capacity - shared).zero_()
    larger[kept:] = 0
    return larger


def rounded_up(tokens: int) -> int:
    """`tokens`, or the next multiple of `EXTENT_STEP`."""
    return -(-tokens // EXTENT_STEP) * EXTENT_STEP
