"""A static key/value cache in which every row has its own length."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache


class SlotCache:
    """Keys and values of `slots` rows of up to `capacity` tokens, per layer [slots, capacity, heads, head_dim].

    A forward pass writes and reads them through a `SlotWindow`. Rolling a row back needs nothing here: entries beyond
    a row's committed length are masked by the caller and overwritten later.
    """

    def __init__(self):
        self.release()

    def release(self) -> None:
        """Give the memory back, as after a pass that failed half-way: nothing of it is counted on again."""
        self.slots = self.capacity = 0
        self.kind: object = None
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.begun = False

    def allocate(self, slots: int, capacity: int, kind: object = None) -> None:
        """Make room for `slots` rows of `capacity` tokens, for one rollout.

        Buffers that are large enough are kept, unless `kind` (such as dtype and device) is another than before. They
        are cleared: what is masked still counts where it is NaN. The first pass may also find them of another dtype
        than it computes in, and makes them anew.
        """
        if slots > self.slots or capacity > self.capacity or kind != self.kind:
            self.slots, self.capacity = max(slots, self.slots), max(capacity, self.capacity)
            self.kind = kind
            self.keys, self.values = [], []
        for buffer in (*self.keys, *self.values):
            buffer.zero_()
        self.begun = False

    def window(self, start: int, positions: Tensor, extent: int) -> SlotWindow:
        """For a forward pass that writes slots start..start + N - 1 at `positions` [N, T] and attends to the first
        `extent` entries of each."""
        first, self.begun = not self.begun, True
        return SlotWindow(self.keys, self.values, (self.slots, self.capacity), start, positions, extent, renew=first)

    def clear_beyond(self, length: Tensor) -> None:
        """Clear what the slots 0..N - 1 hold at and beyond their `length` [N]. For the rare pass that left NaN there:
        masked entries weigh nothing, but nothing times NaN is NaN."""
        stale = torch.arange(self.capacity, device=length.device) >= length[:, None]
        for buffer in (*self.keys, *self.values):
            buffer[: len(length)].masked_fill_(stale[..., None, None], 0)

    def copy(self, source: Tensor, target: Tensor, extent: int) -> None:
        """Slots `target` [N] take over the first `extent` entries of slots `source` [N]."""
        for buffer in (*self.keys, *self.values):
            buffer[target, :extent] = buffer[source, :extent]


class SlotWindow(Cache):
    """What one forward pass sees of a slot cache: a model's attention layers call `update` as they do with any
    transformers cache. The first pass through a layer makes its buffers, of `size` (slots, capacity); with `renew`
    also where they are of another dtype."""

    def __init__(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        size: tuple[int, int],
        start: int,
        positions: Tensor,
        extent: int,
        renew: bool = False,
    ):
        super().__init__(layers=[])
        self.keys, self.values, self.size, self.renew = keys, values, size, renew
        rows = torch.arange(start, start + positions.shape[0], device=positions.device)[:, None]
        self._index = (rows * size[1] + positions).flatten()
        self._rows, self._extent = slice(start, start + positions.shape[0]), extent

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Write [N, heads, T, head_dim] keys and values; return the window's [N, heads, extent, head_dim]."""
        if layer_idx == len(self.keys):
            made = self._make(key_states), self._make(value_states)  # both or, where memory runs out, neither
            self.keys.append(made[0])
            self.values.append(made[1])
        elif self.renew:
            for buffers, states in ((self.keys, key_states), (self.values, value_states)):
                if buffers[layer_idx].dtype != states.dtype:
                    buffers[layer_idx] = self._make(states)
        return self._write(self.keys[layer_idx], key_states), self._write(self.values[layer_idx], value_states)

    def _make(self, states: Tensor) -> Tensor:
        _, heads, _, head_dim = states.shape
        return states.new_zeros(*self.size, heads, head_dim)

    def _write(self, buffer: Tensor, states: Tensor) -> Tensor:
        flat = buffer.view(self.size[0] * self.size[1], -1)
        flat.index_copy_(0, self._index, states.transpose(1, 2).reshape(self._index.shape[0], -1).to(flat.dtype))
        return buffer[self._rows, : self._extent].transpose(1, 2).to(states.dtype)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are given with every forward pass, never counted from the cache."""
        return 0

    def __len__(self) -> int:
        return len(self.keys)


def causal_mask(positions: Tensor, extent: int, window: int | None = None) -> Tensor:
    """Boolean [N, 1, T, extent]: a query at `positions` [N, T] sees the entries up to itself, and with `window` only
    the last `window` of them."""
    entry = torch.arange(extent, device=positions.device)
    query = positions[:, None, :, None]
    mask = entry <= query
    return mask if window is None else mask & (entry > query - window)
