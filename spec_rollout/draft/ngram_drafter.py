"""Guesses without a head: what followed the same tokens in earlier rollouts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spec_rollout.draft.entries import Collecting
from spec_rollout.draft.ngrams import CANDIDATES, LONGEST, ORDERS, History
from spec_rollout.engine.protocols import Drafter
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.transfers import Slots


class NgramDrafter(Collecting):
    """Guesses from the table of `history`, while `collector`, the head's drafter, goes on gathering features."""

    def __init__(self, history: History, collector: Drafter):
        self.history, self.collector = history, collector
        self.shape = {"ngrams": ORDERS, "candidates": CANDIDATES}

    @property
    def token_bytes(self) -> int:
        return self.collector.token_bytes

    def resize(self, rows: Rows, kept: int) -> None:
        self.collector.resize(rows, kept)

    def begin(self, rows: Rows) -> None:
        self.table = self.history.table
        self.back = torch.arange(1 - LONGEST, 1, device=rows.device)
        self.collector.begin(rows)

    def propose(self, rows: Rows, gamma: int, noise: Tensor | None, temperature: float) -> Tensor:
        place = rows.length[: rows.count, None] + self.back
        recent = rows.tokens[: rows.count].gather(1, place.clamp(min=0))
        return self.table.guess(torch.where(place < 0, -1, recent), gamma, noise, rows.vocab_size)

    def proposal(self) -> None:
        """The few followers that are known are no distribution worth a ratio: guesses are taken as they are."""

    def observe(self, rows: Rows, slots: tuple[int, int], start: Tensor, hidden: Sequence[Tensor]) -> None:
        self.collector.observe(rows, slots, start, hidden)

    def admit(self, rows: Rows, slots: tuple[int, int]) -> None:
        """Nothing to prepare."""

    def copy(self, rows: Rows, source: Slots, target: Slots) -> None:
        self.collector.copy(rows, source, target)

    def finish(self, rows: Rows, slots: Slots) -> None:
        self.collector.finish(rows, slots)
