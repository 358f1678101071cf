"""Who sits where: rows enter, are read, move, give way and leave, and the slots' memory follows them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from spec_rollout.config import SpecConfig
from spec_rollout.engine import prefill
from spec_rollout.engine.beginnings import Beginnings
from spec_rollout.engine.guarded_drafter import GuardedDrafter
from spec_rollout.engine.keeper import Keeper
from spec_rollout.engine.kept_rows import KeptRows
from spec_rollout.engine.kept_slot import Put
from spec_rollout.engine.kv_cache import SlotCache, rounded_up
from spec_rollout.engine.prefill import Prefill
from spec_rollout.engine.room import Room
from spec_rollout.engine.rows import Parked, Rows
from spec_rollout.engine.sampling import Sampler
from spec_rollout.engine.scheduler import Admission, Scheduler
from spec_rollout.engine.target import Target
from spec_rollout.engine.transfers import Slots, on_both_sides
from spec_rollout.records import RolloutStats


class Seats:
    """The slots of one rollout. Active rows come first, then those that are still being read.

    All slots are equally long, so that attention reads keys and values as they lie. They grow with the longest row and
    are laid out anew for it; where the bound leaves no room, the youngest rows, those of the last requests, give way.
    What they know is kept, their cache is not: it is read again when they come back, and since their noise is a
    function of their place alone they go on as if they had never left.

    Raises:
        CacheBoundError: a prompt that does not fit into `bound` bytes by itself.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        config: SpecConfig,
        bound: int | None,
        *,
        rows: Rows,
        cache: SlotCache,
        sampler: Sampler,
        target: Target,
        draft: GuardedDrafter,
        stats: RolloutStats,
        kept: KeptRows | None = None,
    ):
        self.scheduler, self.rows, self.cache, self.sampler = scheduler, rows, cache, sampler
        self.target, self.draft, self.stats = target, draft, stats
        self.beginnings = Beginnings(kept, target.recurrent, cache=cache, rows=rows, draft=draft)
        self.ahead = config.widest + 2  # the tokens that a pass reads, and the one that it may sample after them
        # To a compiler, one slot alone or rows read to their end are a case of their own.
        self.least, self.odd = (2, 1) if config.compile_passes == "true" else (1, 0)
        token, slot = target.cache_bytes
        self.room = Room(bound, token + rows.token_bytes, slot, draft.slot_bytes)
        self.keeper = Keeper(kept, self.room, token, cache=cache, rows=rows, draft=draft)
        self.most = max(len(r.prompt) + r.max_new_tokens for r in scheduler.waiting) - 1 + self.ahead
        for request in scheduler.waiting:
            if not self.room.holds(1, rounded_up(len(request.prompt) - 1 + self.ahead)):
                raise self.room.too_long(request.index, len(request.prompt), self.ahead)
        self.parked: dict[int, Parked] = {}
        self.entering: tuple[Admission, Prefill] | None = None
        self.slots = self.capacity = 0
        cache.allocate(0, 0, (target.dtype, target.device))

    @property
    def taken(self) -> int:
        """Slots of active rows, and of those that are being read."""
        return len(self.scheduler.active)

    def admit(self) -> float:
        """Let waiting requests enter and be read: until there is an active row, and from then on one pass at a time.

        Returns the seconds it took.
        """
        began = time.perf_counter()
        if self.entering is None and not self._enter():
            return 0.0
        while self.entering is not None:
            admission, reading = self.entering
            self.rows.count = self.taken  # the drafter is shown the new rows too
            if not reading.finished:
                self.stats.prefilled_tokens += reading.step(self.target, self.cache, self.rows, self.draft)
            if reading.finished:
                self._seat(admission, reading)
            elif reading.first:
                self.rows.count = reading.first
                break
        return time.perf_counter() - began

    def _enter(self) -> bool:
        """Give slots to waiting requests; False where none can have one."""
        admission = self.scheduler.admit(self._fits, prefill.PREFILL_TOKENS, self.beginnings)
        if admission is None:
            return False
        requests, first = admission.requests, admission.first
        tokens = max(self.scheduler.tokens(request) for request in requests)
        puts = self.beginnings.take_out(first, admission.beginnings)
        self._resize(self.taken, max(tokens - 1, self._longest()) + self.ahead, kept=first, puts=puts)
        self.rows.fill(first, requests, self.parked)
        self.rows.count = self.taken  # the drafter is shown the new rows too, those that only copy included
        for request in requests:
            self.parked.pop(request.index, None)
            self.scheduler.known.pop(request.index, None)
        self.sampler.admit(self.rows, first, self.taken)
        fresh = first + len(admission.fresh)
        self.cache.clear((first, fresh))
        taken = self.beginnings.take(self.scheduler.active, (first, fresh), admission.beginnings)
        self.stats.reused_tokens += int(taken.sum()) + int(self.rows.lengths[fresh : self.taken].sum())
        # Those who copy an active row do so at once: it may move, or leave, while the fresh ones are read.
        self.copy(*admission.copies(of_fresh=False))
        self.entering = admission, Prefill(first, fresh, self.rows, taken)
        return True

    def _seat(self, admission: Admission, reading: Prefill) -> None:
        """The fresh rows have been read: with their siblings they are active from here on."""
        self.entering = None
        if admission.fresh:
            self.draft.call("admit", self.rows, (reading.first, reading.first + reading.count))
        self.copy(*admission.copies(of_fresh=True, moved=admission.first - reading.first))

    def make_room(self) -> None:
        """Before a pass: slots as long as the active rows may become in it. Where the bound leaves no room for that,
        rows that are being read give up, then the youngest active ones.

        Raises:
            CacheBoundError: the only row that is left has outgrown the bound.
        """
        needed = self._longest() + self.ahead
        if needed <= self.capacity:
            return
        while not self.room.holds(self.taken, rounded_up(needed)):
            if self.entering is not None:
                self._give_way(list(range(self.rows.count, self.taken)))
            elif self.taken > 1:
                active = self.scheduler.active
                self._give_way([max(range(self.taken), key=lambda slot: active[slot].index)])
                self.stats.preemptions += 1
            else:
                raise self.room.too_long(self.scheduler.active[0].index, self._longest() + 1, self.ahead)
            needed = self._longest() + self.ahead
        self._resize(self.taken, needed, kept=self.taken)

    def stretch(self, tokens: int) -> None:
        """Let all slots have at least `tokens` tokens, whatever rows need."""
        self._resize(self.slots, tokens, kept=self.taken)

    def leave(self, finished: np.ndarray, indices: list[int]) -> None:
        """The rows of the requests `indices` in the slots `finished` are complete: close the gaps that they leave."""
        lacking = self.keeper.lacks_room(finished, self.slots, self.capacity, all_leave=len(finished) == self.taken)
        crowded = lacking and self.entering is None and not self.scheduler.waiting
        if not crowded:
            self.keeper.keep(finished, indices, (self.slots, self.capacity))
        moves = self.scheduler.release(finished.tolist(), self.taken - self.rows.count)
        if crowded:
            self._contract(finished, indices, *moves)
        else:
            self._close(*moves, len(finished))
        self.stats.cache_bytes = max(self.stats.cache_bytes, self.bytes)

    def _contract(self, finished: np.ndarray, indices: list[int], source: list[int], target: list[int]) -> None:
        """The rows in the slots `finished` are kept in the memory of their own slots, which are no more."""
        stay = np.zeros(max(self.taken, self.least) if self.taken else 0, dtype=np.int64)
        stay[: self.taken] = np.arange(self.taken)
        stay[target] = source
        self.slots = len(stay)
        self.keeper.keep(finished, indices, (self.slots, self.capacity), stay)
        if source:
            self._move_all_but_cache(*(on_both_sides(slots, self.rows.device) for slots in (source, target)))
        self.rows.count -= len(finished)
        self.rows.resize(self.slots, self.capacity, self.taken)
        self.draft.call("resize", self.rows, self.taken)

    def _give_way(self, slots: list[int]) -> None:
        """The rows in `slots` wait until there is room for them again."""
        known = []
        for slot in slots:
            begun = self.rows.lengths[slot] + 1 > self.rows.starts[slot]
            known.append(int(self.rows.lengths[slot]) + 1 if begun else 0)
            if begun:
                self.parked[self.scheduler.active[slot].index] = self.rows.park(slot)
        active = sum(slot < self.rows.count for slot in slots)
        self.entering = None
        self._close(*self.scheduler.put_back(slots, known), active)

    def _close(self, source: list[int], target: list[int], gone: int) -> None:
        """Active rows have left `gone` slots: others move from `source` to `target`."""
        self.copy(source, target, move=True)
        self.rows.count -= gone
        if self.entering is not None:
            self.entering[1].first -= gone

    def copy(self, source: list[int], target: list[int], move: bool = False) -> None:
        """Copy slots; a sibling takes over what the cache holds only, a moved row everything."""
        if not source:
            return
        src, dst = (on_both_sides(slots, self.rows.device) for slots in (source, target))
        self.cache.copy(src.device, dst.device, int(self.rows.lengths[source if move else target].max()))
        if move:
            self._move_all_but_cache(src, dst)
        else:
            self.draft.call("copy", self.rows, src, dst)

    def _move_all_but_cache(self, source: Slots, target: Slots) -> None:
        self.rows.copy(source, target)
        self.sampler.copy(source, target)
        self.draft.call("copy", self.rows, source, target)

    def _longest(self) -> int:
        """Committed tokens of the longest active row."""
        return int(self.rows.lengths[: self.rows.count].max(initial=0))

    def _fits(self, slots: int, tokens: int) -> bool:
        """Whether `slots` rows, the longest new one of `tokens` tokens, have room to grow."""
        needed = max(self._longest(), tokens - 1) + self.ahead
        return self.room.holds(slots, self.room.grown(needed))

    def _resize(self, slots: int, needed: int, kept: int, puts: Sequence[Put] = ()) -> None:
        """Slots for `slots` rows of `needed` tokens, if there are not: the first `kept` rows keep theirs. Others take
        over `puts`. Where more would not fit as long as they are, since a long row has left, they get shorter."""
        if slots <= self.slots and needed <= self.capacity:
            self.cache.put(puts)
            return
        slots = max(slots, self.least)
        capacity = self.capacity
        if needed > capacity or not self.room.holds(slots, capacity):
            capacity = self.room.capacity(slots, needed, self.most) + self.odd
        self.keeper.give_way(slots, capacity)
        self.slots, self.capacity = slots, capacity
        self.cache.resize(slots, capacity, kept, puts)
        self.rows.resize(slots, capacity, kept)
        self.draft.call("resize", self.rows, kept)
        self.stats.cache_bytes = max(self.stats.cache_bytes, self.bytes)

    @property
    def bytes(self) -> int:
        """What slots and kept rows take."""
        return self.room.bytes(self.slots, self.capacity) + self.keeper.bytes
