"""Guesses without a head: what followed the same tokens in earlier rollouts."""

from __future__ import annotations

from torch import Tensor

from spec_rollout.draft.collecting import Collecting
from spec_rollout.draft.collector import Collector
from spec_rollout.draft.ngrams import CANDIDATES, ORDERS, History, recent_tokens
from spec_rollout.engine.rows import Rows


class NgramDrafter(Collecting):
    """Guesses from the table of `history`, while the head's `collector` goes on gathering features."""

    def __init__(self, history: History, collector: Collector | None = None):
        super().__init__(collector)
        self.history = history
        self.shape = {"ngrams": ORDERS, "candidates": CANDIDATES}

    def begin(self, rows: Rows) -> None:
        self.table = self.history.table
        super().begin(rows)

    def propose(self, rows: Rows, gamma: int, noise: Tensor | None, temperature: float) -> Tensor:
        return self.table.guess(recent_tokens(rows), gamma, noise, rows.vocab_size)

    def proposal(self) -> None:
        """The few followers that are known are no distribution worth a ratio: guesses are taken as they are."""
