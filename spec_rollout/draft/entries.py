"""The entries that a drafter makes of a row's tokens: kept with it, and taken over by rows that begin as it does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from spec_rollout.draft.collector import Collector
from spec_rollout.engine.kept_slot import KeptSlot, Put
from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.transfers import Slots


class Entries:
    """Stands in the bases of a drafter with a `cache` of its own. The first `known` entries of a slot are those of
    committed tokens."""

    cache: SlotCache
    known: np.ndarray

    def _begin(self, rows: Rows) -> None:
        self.known = np.zeros(rows.slots, dtype=np.int64)

    def _enter(self, slots: tuple[int, int], taken: np.ndarray, kept: list[KeptSlot | None]) -> None:
        """Rows begin in slots[0]..slots[1] - 1 with `taken` [N] tokens: with entries of `kept`, or those that are
        there."""
        here = slice(*slots)
        np.minimum(self.known[here], taken, out=self.known[here])
        for slot, tokens, part in zip(range(*slots), taken.tolist(), kept, strict=True):
            if part is not None:
                self.known[slot] = min(part.tokens, tokens)
                self.cache.put([Put(slot, part, int(self.known[slot]))])

    def _keep(self, rows: Rows, slots: Slots) -> list[KeptSlot | None]:
        known = np.minimum(self.known, rows.lengths)
        return [self.cache.keep(slot, int(known[slot])) for slot in slots.host.tolist()]

    def _copy(self, rows: Rows, source: Slots, target: Slots, extent: int) -> None:
        self.cache.copy(source.device, target.device, extent)
        self.known[target.host] = np.minimum(self.known[source.host], rows.lengths[target.host])


class HeadEntries(Entries):
    """Those of a head. They are made of states of the policy, so that none can be made up for later."""

    ready: bool
    collector: Collector
    _read_until: Callable[[Rows, int, int, np.ndarray, int], int]

    def keep(self, rows: Rows, slots: Slots) -> list[KeptSlot | None]:
        if not self.ready:
            return [None] * len(slots.host)
        lengths = rows.lengths[: rows.count] - 1  # the last entry of a row that goes on is what it guesses from
        lengths[slots.host] += 1
        self._read_until(rows, 0, rows.count, lengths, 0)
        return self._keep(rows, slots)

    def takes(self, rows: Rows, kept: KeptSlot | None) -> bool:
        return kept is not None or not self.ready

    def enter(self, rows: Rows, slots: tuple[int, int], taken: np.ndarray, kept: list[KeptSlot | None]) -> None:
        self._enter(slots, taken, kept)
        self.collector.enter(rows, slots, taken)
