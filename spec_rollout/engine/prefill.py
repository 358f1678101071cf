"""Prefill: what is known of new rows, read once in passes that other rows' steps come between."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from spec_rollout.engine.guarded_drafter import GuardedDrafter
from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.target import Target
from spec_rollout.engine.transfers import upload

PREFILL_TOKENS = 4096
"""Most tokens of one prefill pass, padding included."""
FURTHER_TOKENS = 1024
"""Most tokens of a row in a pass that is not its first: it needs a mask, under which few at a time take less time."""


def passes(first: int, done: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[tuple[int, int], int]]:
    """The slots (start, stop) of rows that sit in the slots from `first` on, pass by pass, each with the most tokens
    that any of them reads in it. Of `lengths` [N] tokens, the `done` [N] first are there; rows of which all are need
    no pass, and one of more than PREFILL_TOKENS takes several."""
    left, begun = lengths - done, done > 0
    start = 0
    while start < len(left):
        stop = start + 1
        while stop < len(left) and left[start : stop + 1].max() * (stop + 1 - start) <= PREFILL_TOKENS:
            stop += 1
        most = FURTHER_TOKENS if begun[start:stop].any() else PREFILL_TOKENS
        while (width := int(min(left[start:stop].max(), most))) > 0:
            yield (first + start, first + stop), width
            left[start:stop] = np.maximum(left[start:stop] - width, 0)
            most = FURTHER_TOKENS
        start = stop


class Prefill:
    """Reads all known tokens but the last, which the first verify pass takes, of the rows in the slots first..last-1,
    of which the `done` [N] first are in the cache; shows the drafter what the target computed.

    `first` follows the rows when they move.
    """

    def __init__(self, first: int, last: int, rows: Rows, done: np.ndarray):
        self.first, self.count, self.done = first, last - first, done
        self._passes = list(passes(0, done, rows.lengths[first:last]))

    @property
    def finished(self) -> bool:
        return not self._passes

    def step(self, target: Target, cache: SlotCache, rows: Rows, draft: GuardedDrafter) -> int:
        """One pass. Returns how many tokens it read, without padding."""
        (begin, end), width = self._passes.pop(0)
        wide = max(width, 2)  # see Target.reads_pairs
        slots = self.first + begin, self.first + end
        active, done = slice(*slots), upload(self.done[begin:end].copy(), rows.device)
        place = done[:, None] + torch.arange(wide, device=rows.device)
        # Beyond a row's end its own last token is read, into entries that are not its yet.
        ids = rows.tokens[active].gather(1, torch.minimum(place, rows.length[active, None]))
        left = np.minimum(rows.lengths[active] - self.done[begin:end], width)
        place = place.clamp(max=rows.capacity - 1)
        extent = cache.extent(int(self.done[begin:end].max()) + wide)
        given = {"lengths": upload(left, rows.device), "first": not self.done[begin:end].any()}
        _, hidden = target.forward(cache, slots, ids, place, extent, keep_logits=1, **given)
        draft.call("read", rows, slots, self.done[begin:end].copy(), hidden)
        self.done[begin:end] += left
        return int(left.sum())
