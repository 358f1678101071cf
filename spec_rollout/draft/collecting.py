"""A drafter that is not the head, while the head goes on learning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from spec_rollout.draft.collector import Collector, nobody
from spec_rollout.engine.kept_slot import KeptSlot
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.transfers import Slots


class Collecting:
    """Hands all verbs but guessing on to `collector`, the head's; None collects nothing."""

    ready = True

    def __init__(self, collector: Collector | None = None):
        self.collector = collector or nobody()

    def slot_bytes(self, capacity: int) -> int:
        return self.collector.slot_bytes(capacity)

    def begin(self, rows: Rows) -> None:
        self.collector.begin(rows)

    def end(self) -> None:
        self.collector.end()

    def resize(self, rows: Rows, kept: int) -> None:
        self.collector.resize(rows, kept)

    def read(self, rows: Rows, slots: tuple[int, int], start: np.ndarray, hidden: Sequence[Tensor]) -> None:
        self.collector.read(rows, slots, start, hidden)

    def admit(self, rows: Rows, slots: tuple[int, int]) -> None:
        self.collector.admit(rows, slots)

    def observe(self, rows: Rows, slots: tuple[int, int], start: Tensor, hidden: Sequence[Tensor]) -> None:
        self.collector.observe(rows, slots, start, hidden)

    def copy(self, rows: Rows, source: Slots, target: Slots) -> None:
        self.collector.copy(rows, source, target)

    def finish(self, rows: Rows, slots: Slots) -> None:
        self.collector.finish(rows, slots)

    def keep(self, rows: Rows, slots: Slots) -> list[KeptSlot | None]:
        return [None] * len(slots.host)

    def takes(self, rows: Rows, kept: KeptSlot | None) -> bool:
        """What it needs of a row it reads in its tokens."""
        return True

    def enter(self, rows: Rows, slots: tuple[int, int], taken: np.ndarray, kept: list[KeptSlot | None]) -> None:
        self.collector.enter(rows, slots, taken)
