"""The features of each slot's last entries, and of the last ones of its prompt: bounded, however long rows become."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spec_rollout.engine.kv_cache import resized
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.transfers import Slots, upload


class Window:
    """Of each slot the last `width` entries, entry p at p modulo `width`, and the last `context` ones of its prompt.

    The latter are there for siblings, who take over a prompt when its first row may be far beyond it.

    Attributes:
        seen: entries of each slot that have been written since its row began, [slots].
    """

    def __init__(self):
        self.release()

    def release(self) -> None:
        """Give the memory back."""
        self.ring: Tensor | None = None
        """[S, width, F]"""
        self.tail: Tensor | None = None
        """[S, context, F]; the last entry of the prompt comes last."""
        self.seen = np.zeros(0, dtype=np.int64)

    def allocate(self, rows: Rows, width: int, context: int, like: Tensor) -> None:
        """For `rows`, which have no room yet, and features such as `like` [F]."""
        self.seen = np.zeros(rows.slots, dtype=np.int64)
        self.ring, self.tail = (like.new_zeros(0, size, len(like)) for size in (width, context))

    def resize(self, slots: int, kept: int) -> None:
        """From here on there are `slots`; the first `kept` keep what they hold."""
        if slots != len(self.ring):
            self.ring, self.tail = (resized(b, slots, b.shape[1], kept) for b in (self.ring, self.tail))

    @property
    def width(self) -> int:
        return self.ring.shape[1]

    def fit(self, tokens: int) -> None:
        """Let passes of `tokens` tokens take at most half of the width."""
        if 2 * tokens <= self.width:
            return
        device, old = self.ring.device, self.width
        slots = torch.arange(len(self.ring), device=device)[:, None]
        seen = upload(self.seen[: len(self.ring)].copy(), device)
        place = (seen[:, None] - 1 - torch.arange(old, device=device)).clamp(min=0)
        ring = self.ring.new_zeros(len(self.ring), 2 * tokens, self.ring.shape[2])
        ring[slots, place % ring.shape[1]] = self.ring[slots, place % old]
        self.ring = ring

    def write(self, slots: tuple[int, int], start: Tensor, parts: Sequence[Tensor]) -> None:
        """Entries start[n] + 0..T-1 of the slots slots[0]..slots[1]-1, whose features are `parts` [N, T, …] beside
        each other."""
        place = start[:, None] + torch.arange(parts[0].shape[1], device=start.device)
        self._put(torch.arange(*slots, device=start.device)[:, None] * self.width + place % self.width, parts)

    def write_prompt(self, rows: Rows, slots: tuple[int, int], start: np.ndarray, parts: Sequence[Tensor]) -> None:
        """As `write`, for a piece of what is known of new rows, of any width; beyond a row's length is padding."""
        here, device, pieces = slice(*slots), rows.device, parts[0].shape[1]
        end = np.minimum(start + pieces, rows.lengths[here])
        first, stop, prompt = upload(np.stack([start, end, rows.starts[here] - 1]), device)[:, :, None]
        place = stop - 1 - torch.arange(min(pieces, self.width), device=device)
        place = torch.maximum(place, first)  # a row with fewer writes its first one again
        index = torch.arange(*slots, device=device)[:, None] * self.width + place % self.width
        self._put(index, [_at(part, place - first) for part in parts])
        column = prompt - first - torch.arange(self.tail.shape[1], 0, -1, device=device)
        within, offset = ((column >= 0) & (column < stop - first))[..., None], 0
        for part in parts:
            kept = self.tail[here, :, offset : offset + part.shape[2]]
            kept.copy_(torch.where(within, _at(part, column.clamp(0, pieces - 1)).to(kept.dtype), kept))
            offset += part.shape[2]
        self.seen[here] = end

    def copy(self, rows: Rows, source: Slots, target: Slots) -> None:
        """Slots `target` [N] take over what `source` [N] hold; of a sibling that has gone on, the prompt's."""
        self.ring[target.device] = self.ring[source.device]
        self.tail[target.device] = self.tail[source.device]
        self.seen[target.host] = np.minimum(self.seen[source.host], rows.lengths[target.host])
        new = target.host[rows.lengths[target.host] == rows.starts[target.host] - 1]
        places = np.stack([new, (rows.lengths[new] - 1).clip(0) % self.width])
        slot, place = upload(places, rows.device)
        self.ring[slot, place] = self.tail[slot, -1]

    def entries(self, slot: int, start: int, stop: int) -> Tensor:
        """A copy of the features [stop - start, F] of the entries start..stop - 1, which are still there."""
        return self.ring[slot].index_select(0, upload(np.arange(start, stop) % self.width, self.ring.device))

    def prompt(self, slot: int, entries: int) -> Tensor:
        """The features [entries, F] of the last entries of the prompt."""
        return self.tail[slot, self.tail.shape[1] - entries :]

    def _put(self, index: Tensor, parts: Sequence[Tensor]) -> None:
        flat, offset = self.ring.view(-1, self.ring.shape[2]), 0
        for part in parts:
            column = flat[:, offset : offset + part.shape[2]]
            column.index_copy_(0, index.flatten(), part.flatten(0, 1).to(flat.dtype))
            offset += part.shape[2]


def _at(x: Tensor, entries: Tensor) -> Tensor:
    """x [N, T, F] at `entries` [N, M]."""
    return x.gather(1, entries[..., None].expand(-1, -1, x.shape[2]))
