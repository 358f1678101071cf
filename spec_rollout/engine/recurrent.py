"""The states of recurrent layers, one per slot, kept at each row's committed tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spec_rollout.records import UnsupportedModelError

Advance = Callable[[Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
"""(state [N, …] or None for zeros, valid [N, T] bool or None for all) -> output of the layer's recurrence over T
tokens and the state after the valid ones; a token that is not valid leaves the state as it is."""


Key = tuple[int, int]
"""A layer, and which of its states."""


class Inputs(NamedTuple):
    """What a pass over several guesses leaves behind until it is known how many came true: the inputs of a
    convolution, those before the pass included [N, C, K - 1 + T], and the recurrence that follows it, if one does."""

    convolved: Tensor
    advance: Advance | None = None


class RecurrentStates:
    """Per recurrent layer the last K - 1 inputs of its convolution [slots, C, K - 1] and the state of its recurrence
    [slots, …], each after the row's committed tokens.

    A state cannot be rolled back by lowering a number. So a pass over guesses leaves it alone and keeps its own
    inputs, which are small; `commit` replays those that came true.
    """

    def __init__(self):
        self.slots = 0
        self.convolutions: dict[Key, Tensor] = {}
        self.states: dict[Key, Tensor] = {}
        self.pending: dict[Key, Inputs] = {}

    def allocate(self, slots: int) -> None:
        """Drop what there is; the next pass makes the buffers, of `slots` rows."""
        self.slots = slots
        self.convolutions, self.states, self.pending = {}, {}, {}

    def resize(self, slots: int, kept: int) -> None:
        """From here on there are `slots`; the first `kept` keep their states. No pass waits for its `commit`."""
        self.slots = slots
        for kind in (self.convolutions, self.states):
            for key, buffer in kind.items():
                kind[key] = buffer.new_zeros(slots, *buffer.shape[1:])
                kind[key][:kept] = buffer[:kept]

    def choose(self, slots: Sequence[int]) -> None:
        """From here on there are the `slots` alone, in that order. No pass waits for its `commit`."""
        self.slots = len(slots)
        for kind in (self.convolutions, self.states):
            for key, buffer in kind.items():
                kind[key] = buffer[list(slots)]

    @property
    def buffers(self) -> list[Tensor]:
        return [*self.convolutions.values(), *self.states.values()]

    def clear(self, slots: tuple[int, int]) -> None:
        """New rows sit in slots[0]..slots[1] - 1 and have no token yet."""
        for buffer in self.buffers:
            buffer[slots[0] : slots[1]] = 0

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Slots `target` [N] take over the states of slots `source` [N]."""
        for buffer in self.buffers:
            buffer[target] = buffer[source]

    def keep(self, slot: int) -> list[dict[Key, Tensor]]:
        """Copies of the convolutions' inputs and of the states of `slot`."""
        return [{key: b[slot].clone() for key, b in kind.items()} for kind in (self.convolutions, self.states)]

    def put(self, slot: int, convolutions: dict[Key, Tensor], states: dict[Key, Tensor]) -> None:
        """`slot` takes over what `keep` gave; buffers that are missing are made."""
        for kind, parts in ((self.convolutions, convolutions), (self.states, states)):
            for key, part in parts.items():
                if key not in kind:
                    kind[key] = part.new_zeros(self.slots, *part.shape)
                kind[key][slot] = part

    def commit(self, tokens: Tensor) -> None:
        """Of the tokens of the last pass, row n keeps the first `tokens` [N]."""
        rows, true = slice(0, len(tokens)), None
        for key, (convolved, advance) in self.pending.items():
            kept = self.convolutions[key]
            kept[rows] = _last(convolved, tokens, kept.shape[-1])
            if advance is not None:
                true = first(tokens, convolved.shape[-1] - kept.shape[-1]) if true is None else true
                self.states[key][rows] = advance(self.states[key][rows], true)[1]
        self.pending = {}


class RecurrentPass:
    """One forward pass over `width` tokens of the slots `rows`, as its recurrent layers see it.

    With `lengths` [N], row n's tokens beyond the first lengths[n] are padding and the states follow the others at
    once; without, the pass reads guesses, and the states follow at `RecurrentStates.commit`. A single token needs no
    such wait.
    """

    def __init__(self, states: RecurrentStates, rows: slice, width: int, lengths: Tensor | None):
        states.pending = {}
        self.states, self.rows, self.width, self.lengths = states, rows, width, lengths
        self.valid = None if lengths is None else first(lengths, width)
        self.waits = lengths is None and width > 1
        self.key: Key | None = None

    def convolve(self, inputs: Tensor, key: Key, taps: int) -> Tensor:
        """The `inputs` [N, C, T] of the convolution `key`, over `taps` = K of them, behind those of the row's last
        K - 1 tokens: [N, C, K - 1 + T]."""
        kept = self.states.convolutions.get(key)
        if kept is None:
            kept = inputs.new_zeros(self.states.slots, inputs.shape[1], taps - 1)
            self.states.convolutions[key] = kept
        convolved = torch.cat([kept[self.rows].to(inputs.dtype), inputs], -1)
        self.key = key
        if self.waits:
            self.states.pending[key] = Inputs(convolved)
        elif self.lengths is None:
            kept[self.rows] = convolved[..., 1:]
        else:
            kept[self.rows] = _last(convolved, self.lengths, taps - 1)
        return convolved

    def recur(self, advance: Advance) -> tuple[Tensor, Tensor]:
        """Output and last state of the recurrence behind the convolution that was just asked for."""
        key, self.key = self.key, None
        if key is None:
            raise UnsupportedModelError(
                "a layer has a recurrence without a convolution that reads the cache before it"
            )
        kept = self.states.states.get(key)
        output, state = advance(None if kept is None else kept[self.rows], self.valid)
        if kept is None:
            kept = self.states.states[key] = state.new_zeros(self.states.slots, *state.shape[1:])
        if self.waits:
            self.states.pending[key] = self.states.pending[key]._replace(advance=advance)
        else:
            kept[self.rows] = state
        return output, state


def first(tokens: Tensor, width: int) -> Tensor:
    """Boolean [N, width]: the first tokens[n] of each row."""
    return torch.arange(width, device=tokens.device) < tokens[:, None]


def _last(convolved: Tensor, tokens: Tensor, size: int) -> Tensor:
    """The `size` inputs [N, C, size] that end with the first `tokens` [N] of the pass."""
    place = tokens[:, None] + torch.arange(size, device=tokens.device)
    return convolved.gather(-1, place[:, None].expand(-1, convolved.shape[1], -1))
