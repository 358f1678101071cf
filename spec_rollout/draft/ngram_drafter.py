"""Guesses without a head: what followed the same tokens before, in this rollout and in earlier ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spec_rollout.draft.ngrams import CANDIDATES, LONGEST, ORDERS, History, guess
from spec_rollout.draft.running import RunningTable
from spec_rollout.engine.protocols import Drafter
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.transfers import Slots

FIRST_RATE = 0.3
"""Acceptance rate that guesses from a rollout's own beginning are taken to have, until they were judged."""
FEWEST = 32
"""Completions from which on a first rollout guesses from itself: fewer repeat too little to pay for looking."""


class NgramDrafter:
    """Guesses from what this rollout has drawn so far and from the table of `history`, while `collector`, the head's
    drafter, goes on gathering features."""

    def __init__(self, history: History, collector: Drafter):
        self.history, self.collector = history, collector
        self.shape = {"ngrams": ORDERS, "candidates": CANDIDATES, "running": True}

    def begin(self, rows: Rows) -> None:
        self.running = RunningTable(rows.device)
        self.earlier = [self.history.table] if self.history else []
        self.back = torch.arange(1 - LONGEST, 1, device=rows.device)
        self.collector.begin(rows)

    def propose(self, rows: Rows, gamma: int, noise: Tensor | None, temperature: float) -> Tensor:
        self.running.follow(rows)
        tables = self.earlier if self.running.table is None else [self.running.table, *self.earlier]
        if not tables:
            return rows.tokens[: rows.count, :0]
        place = rows.length[: rows.count, None] + self.back
        recent = rows.tokens[: rows.count].gather(1, place.clamp(min=0))
        return guess(tables, torch.where(place < 0, -1, recent), gamma, noise, rows.vocab_size)

    def proposal(self) -> None:
        """The few followers that are known are no distribution worth a ratio: guesses are taken as they are."""

    def observe(self, rows: Rows, slots: tuple[int, int], start: Tensor, hidden: Sequence[Tensor]) -> None:
        self.collector.observe(rows, slots, start, hidden)

    def admit(self, rows: Rows, slots: tuple[int, int]) -> None:
        """Nothing to prepare."""

    def copy(self, rows: Rows, source: Slots, target: Slots) -> None:
        self.collector.copy(rows, source, target)

    def finish(self, rows: Rows, slots: Slots) -> None:
        self.running.finish(rows, slots.host)
        self.collector.finish(rows, slots)
