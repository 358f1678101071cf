"""Guesses without a head: what followed the same tokens in earlier rollouts."""

from __future__ import annotations

import torch
from torch import Tensor

from spec_rollout.draft.collecting import Collecting
from spec_rollout.draft.collector import Collector
from spec_rollout.draft.ngrams import CANDIDATES, LONGEST, ORDERS, History
from spec_rollout.engine.rows import Rows


class NgramDrafter(Collecting):
    """Guesses from the table of `history`, while the head's `collector` goes on gathering features."""

    def __init__(self, history: History, collector: Collector | None = None):
        super().__init__(collector)
        self.history = history
        self.shape = {"ngrams": ORDERS, "candidates": CANDIDATES}

    def begin(self, rows: Rows) -> None:
        self.table = self.history.table
        self.back = torch.arange(1 - LONGEST, 1, device=rows.device)
        super().begin(rows)

    def propose(self, rows: Rows, gamma: int, noise: Tensor | None, temperature: float) -> Tensor:
        place = rows.length[: rows.count, None] + self.back
        recent = rows.tokens[: rows.count].gather(1, place.clamp(min=0))
        return self.table.guess(torch.where(place < 0, -1, recent), gamma, noise, rows.vocab_size)

    def proposal(self) -> None:
        """The few followers that are known are no distribution worth a ratio: guesses are taken as they are."""
