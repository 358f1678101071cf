"""Finished rows on their way from the slots to those that are kept."""

from __future__ import annotations

import numpy as np

from spec_rollout.engine.guarded_drafter import GuardedDrafter
from spec_rollout.engine.kept_rows import KeptRow, KeptRows
from spec_rollout.engine.kept_slot import KeptSlot
from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.engine.room import Room
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.transfers import on_both_sides


class Keeper:
    """Adds finished rows to `kept` as far as the bound of `room` leaves memory beside the slots for them, of which a
    token takes `token_bytes` in the policy's cache; does nothing where `kept` is None."""

    def __init__(
        self,
        kept: KeptRows | None,
        room: Room,
        token_bytes: int,
        *,
        cache: SlotCache,
        rows: Rows,
        draft: GuardedDrafter,
    ):
        self.kept, self.room, self.token_bytes = kept, room, token_bytes
        self.cache, self.rows, self.draft = cache, rows, draft

    @property
    def bytes(self) -> int:
        """What kept rows take."""
        return 0 if self.kept is None else self.kept.bytes

    def give_way(self, slots: int, capacity: int) -> None:
        """There will be `slots` of `capacity` tokens: kept rows go, the oldest first, until both have room."""
        if self.kept is not None and self.room.bound is not None:
            self.kept.shrink(max(self.room.left(slots, capacity), 0))

    def lacks_room(self, finished: np.ndarray, slots: int, capacity: int, all_leave: bool) -> bool:
        """Whether the rows in the slots `finished` are not to be kept beside what is there: if they cannot all be, or
        if with them `all_leave`, since then nothing has to move for it."""
        if self.kept is None or all_leave:
            return self.kept is not None
        if self.room.bound is None:
            return False
        return self.room.left(slots, capacity) - self.kept.bytes < sum(map(self._bytes, finished))

    def keep(
        self, finished: np.ndarray, indices: list[int], size: tuple[int, int], stay: np.ndarray | None = None
    ) -> None:
        """Keep the rows of the requests `indices` [N] in the slots `finished` [N]. Where `stay` is given, these slots
        are all that there are from here on; size = (slots, capacity) is what is there beside kept rows afterwards."""
        if self.kept is None:
            return
        parts = self.draft.keep(self.rows, on_both_sides(finished, self.rows.device))
        chosen = self._chosen(finished, size)
        gone = [(int(finished[i]), int(self.rows.lengths[finished[i]])) for i in chosen]
        found: list[KeptSlot] = (
            [self.cache.keep(*row) for row in gone] if stay is None else self.cache.leave(gone, stay.tolist())
        )
        for i, slot in zip(chosen, found, strict=True):
            self.kept.add(KeptRow(indices[i], slot, parts[i]))

    def _chosen(self, finished: np.ndarray, size: tuple[int, int]) -> list[int]:
        """Which of the rows in the slots `finished` there is room for, once older rows are dropped for it."""
        if self.room.bound is None:
            return list(range(len(finished)))
        left, needed, chosen = self.room.left(*size), 0, []
        for i, slot in enumerate(finished):
            if needed + self._bytes(slot) <= left:
                needed += self._bytes(slot)
                chosen.append(i)
        self.kept.shrink(max(left - needed, 0))
        return chosen

    def _bytes(self, slot: int) -> int:
        """At most what is kept of the row in `slot`."""
        tokens = int(self.rows.lengths[slot])
        return self.room.slot_bytes + tokens * self.token_bytes + self.draft.slot_bytes(tokens)
