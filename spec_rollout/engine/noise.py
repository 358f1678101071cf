"""Gumbel noise as a pure function of (request key, position, lane), from a counter-based generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from spec_rollout.engine.transfers import Slots, upload

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
AHEAD = 32
"""Most positions of a row for which noise is drawn at once."""
AHEAD_NUMBERS = 2**22
"""Most numbers that one draw for several positions may have."""


class KeyedRows(Protocol):
    """What noise is drawn for: `engine.rows.Rows`, or rows of another engine."""

    slots: int
    device: torch.device
    count: int
    lengths: np.ndarray
    starts: np.ndarray
    key: Tensor

    def progress(self) -> Tensor:
        """Index [B] of the completion token that each active row samples next."""


def request_keys(seed: Sequence[int], count: int) -> list[tuple[int, int]]:
    """`count` distinct 64-bit keys, as pairs of signed 32-bit words, from any sequence of non-negative integers.

    NumPy's `SeedSequence` mixes the integers, so neighbouring seeds, ranks and steps share nothing. It pads short
    sequences with zeros; their length, appended, tells (1,) from (1, 0).
    """
    words = np.random.SeedSequence([*seed, len(seed)]).generate_state(2 * count, np.uint32).view(np.int32)
    return [tuple(pair) for pair in words.reshape(count, 2).tolist()]


def threefry(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Threefry-2x32-20: two words of 32 random bits per counter.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). All tensors are int32 and broadcast; it
    needs only additions, rotations and exclusive or, which wrap on int32 as they do on uint32.
    """
    k0, k1 = key
    keys = (k0, k1, k0 ^ k1 ^ PARITY)
    x0, x1 = counter[0] + k0, counter[1] + k1
    x0, x1 = (x.contiguous() for x in torch.broadcast_tensors(x0, x1))
    spare = torch.empty_like(x0)
    for block in range(5):
        for rotation in ROTATIONS[block % 2]:
            x0 += x1
            torch.bitwise_right_shift(x1, 32 - rotation, out=spare)
            spare &= (1 << rotation) - 1  # the shift of an int32 drags its sign along
            x1 <<= rotation
            x1 |= spare
            x1 ^= x0
        x0 += keys[(block + 1) % 3]
        x1 += keys[(block + 2) % 3] + (block + 1)
    return x0, x1


def gumbel(keys: Tensor, positions: Tensor, width: int) -> Tensor:
    """Standard Gumbel noise [B, T, width] float32 for request `keys` [B, 2] int32 at `positions` [B, T].

    31 of the 32 bits make a uniform u, and u the exponential variable -log1p(-u). That keeps its precision near 0,
    where the winners of a Gumbel race are decided: the largest noise is 22.2.
    """
    half = (width + 1) // 2
    lane = torch.arange(half, dtype=torch.int32, device=keys.device)
    key = (keys[:, 0, None, None], keys[:, 1, None, None])
    words = torch.cat(threefry(key, (lane, positions.to(torch.int32)[:, :, None])), dim=-1)[..., :width]
    uniform = words.bitwise_and_(0x7FFFFFFF).float().mul_(2.0**-31).add_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


class NoiseWindow:
    """The noise of the rows' coming positions, drawn for many positions at once: every step would otherwise pay the
    fixed cost of the generator's hundred small operations. There are `numbers` of them, N, per position."""

    def __init__(self, rows: KeyedRows, numbers: int):
        self.numbers = numbers
        self.ahead = min(AHEAD, AHEAD_NUMBERS // (rows.slots * self.numbers))
        self.first = np.full(rows.slots, -(2**31))
        """Completion position of each slot's first column, as the host knows it."""
        self.start = torch.zeros(rows.slots, dtype=torch.int64, device=rows.device)
        """The same, as the device does."""
        self.window = torch.zeros(rows.slots, self.ahead, self.numbers, device=rows.device)

    def take(self, rows: KeyedRows, width: int) -> Tensor:
        """Noise [B, width, N] of the positions that the active rows sample next."""
        if width > self.ahead:
            return self._draw(rows, width, slice(0, rows.count))
        active = slice(0, rows.count)
        progress = rows.lengths[active] + 1 - rows.starts[active]
        offset = progress - self.first[active]
        if (offset + width > self.ahead).any():
            spent = np.flatnonzero(offset + width > self.ahead // 2)  # and those that soon would be, in one go
            slots = upload(spent, rows.device)
            self.window[slots] = self._draw(rows, self.ahead, slots)
            self.start[slots] = rows.progress()[slots]
            self.first[spent] = progress[spent]
        row = torch.arange(rows.count, device=rows.device)[:, None]
        offset = rows.progress() - self.start[active]
        column = offset[:, None] + torch.arange(width, device=rows.device)
        return self.window[row, column]

    def admit(self, first: int, last: int) -> None:
        """Slots first..last-1 have new requests."""
        self.first[first:last] = -(2**31)

    def copy(self, source: Slots, target: Slots) -> None:
        for state in (self.window, self.start):
            state[target.device] = state[source.device]
        self.first[target.host] = self.first[source.host]

    def _draw(self, rows: KeyedRows, width: int, slots: Tensor | slice) -> Tensor:
        steps = rows.progress()[slots, None] + torch.arange(width, device=rows.device)
        return gumbel(rows.key[slots], steps, self.numbers)
