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
    """Of each row, from the last `context` entries of its prompt on, the first `context` entries stay, and of those
    behind them the last `width`, which go round. The former are there for siblings, who take over a prompt when its
    first row may be far beyond it. No slot holds more entries than it has tokens.

    Attributes:
        seen: entries of each slot that have been written since its row began, [slots].
    """

    def __init__(self):
        self.release()

    def release(self) -> None:
        """Give the memory back."""
        self.context = self.width = self.capacity = 0
        self.kept: Tensor | None = None
        """[S, E, F]"""
        self.seen = np.zeros(0, dtype=np.int64)

    def allocate(self, rows: Rows, width: int, context: int, like: Tensor) -> None:
        """For `rows`, which have no room yet, and features such as `like` [F]."""
        self.context, self.width = context, width
        self.seen = np.zeros(rows.slots, dtype=np.int64)
        self.kept = like.new_zeros(0, 0, len(like))

    def resize(self, slots: int, capacity: int, kept: int) -> None:
        """From here on there are `slots` of `capacity` tokens; the first `kept` slots keep what they hold."""
        self.capacity = capacity
        size = slots, min(capacity, self.context + self.width)
        if size != self.kept.shape[:2]:
            self.kept = resized(self.kept, *size, kept)

    def fit(self, rows: Rows, tokens: int) -> None:
        """Let passes of `tokens` tokens take at most half of the width."""
        if 2 * tokens <= self.width:
            return
        old, before, slots = self.width, self.kept, min(len(self.kept), len(self.seen))
        self.width = 2 * tokens
        self.kept = before.new_zeros(len(before), min(self.capacity, self.context + self.width), before.shape[2])
        first = self.base(rows.starts[:slots])
        last = upload(np.maximum(self.seen[:slots] - 1, first), rows.device)
        first = upload(first, rows.device)[:, None]
        place = first + torch.arange(min(self.context, before.shape[1]), device=rows.device)
        recent = torch.maximum(last[:, None] - torch.arange(old, device=rows.device), first)
        slot = torch.arange(slots, device=rows.device)[:, None]
        for entries in (place, recent):
            source = indices(entries - first, self.context, old).clamp(max=before.shape[1] - 1)
            self.kept[slot, indices(entries - first, self.context, self.width)] = before[slot, source]

    def base(self, prompt: np.ndarray) -> np.ndarray:
        """The first entry that is kept of rows with `prompt` tokens to begin with."""
        return np.maximum(prompt - 1 - self.context, 0)

    def missing(self, rows: Rows, slots: slice, entries: np.ndarray, tokens: int) -> np.ndarray:
        """Whether a pass of `tokens` more makes a slot lose some of those from `entries` on, [N] bool."""
        fixed = self.base(rows.starts[slots]) + self.context
        return self.seen[slots] + tokens - np.maximum(entries, fixed) > self.width

    def write(self, rows: Rows, slots: tuple[int, int], start: Tensor, parts: Sequence[Tensor]) -> None:
        """Entries start[n] + 0..T-1 of the slots slots[0]..slots[1]-1, whose features are `parts` [N, T, …] beside
        each other."""
        place = start[:, None] + torch.arange(parts[0].shape[1], device=start.device)
        self._put(slots, self.at(place, rows.start[slice(*slots)]), torch.cat(tuple(parts), -1))

    def write_prompt(self, rows: Rows, slots: tuple[int, int], start: np.ndarray, parts: Sequence[Tensor]) -> None:
        """As `write`, for a piece of what is known of new rows, of any width; beyond a row's length is padding."""
        here, device, pieces = slice(*slots), rows.device, parts[0].shape[1]
        end, base = np.minimum(start + pieces, rows.lengths[here]), self.base(rows.starts[here])
        self.seen[here] = end
        first, stop = upload(np.stack([start - base, end - base]), device)[:, :, None]
        if (end - base).max() > self.context:
            place = stop - 1 - torch.arange(min(pieces, self.width), device=device)
            place = torch.maximum(place, first.clamp(min=0))  # a row with fewer writes its first one again
            given = [_at(part, (place - first).clamp(max=pieces - 1)) for part in parts]
            self._put(slots, indices(place, self.context, self.width), torch.cat(given, -1))
        size = min(self.context, self.kept.shape[1])
        column, offset = torch.arange(size, device=device) - first, 0
        within = ((column >= 0) & (column < stop - first))[..., None]
        for part in parts:
            kept = self.kept[here, :size, offset : offset + part.shape[2]]
            kept.copy_(torch.where(within, _at(part, column.clamp(0, pieces - 1)).to(kept.dtype), kept))
            offset += part.shape[2]

    def copy(self, rows: Rows, source: Slots, target: Slots) -> None:
        """Slots `target` [N] take over what `source` [N] hold."""
        self.kept[target.device] = self.kept[source.device]
        self.seen[target.host] = np.minimum(self.seen[source.host], rows.lengths[target.host])

    def entries(self, rows: Rows, slot: int, start: int, stop: int) -> Tensor:
        """A copy of the features [stop - start, F] of the entries start..stop - 1, which are still there."""
        place = np.arange(start, stop) - self.base(rows.starts[slot])
        index = np.where(place < self.context, place, self.context + (place - self.context) % self.width)
        return self.kept[slot].index_select(0, upload(index, self.kept.device))

    def at(self, place: Tensor, prompt: Tensor) -> Tensor:
        """Where the entries `place` [N, T] are in slots whose rows had `prompt` [N] tokens to begin with."""
        place = place - (prompt - (1 + self.context)).clamp_(min=0)[:, None]
        # Slots of so few tokens do not go round.
        return indices(place, self.context, self.width) if self.capacity > self.context + self.width else place

    def _put(self, slots: tuple[int, int], place: Tensor, features: Tensor) -> None:
        row = torch.arange(*slots, device=place.device)[:, None] * self.kept.shape[1]
        flat = self.kept.view(-1, self.kept.shape[2])
        flat.index_copy_(0, (row + place).flatten(), features.flatten(0, 1).to(flat.dtype))


def indices(place: Tensor, context: int, width: int) -> Tensor:
    """Where a window has the entries `place`, counted from the first that is kept."""
    return torch.where(place < context, place, context + (place - context) % width)


def _at(x: Tensor, entries: Tensor) -> Tensor:
    """x [N, T, F] at `entries` [N, M]."""
    return x.gather(1, entries[..., None].expand(-1, -1, x.shape[2]))
