"""How many tokens a step emits, from the guesses that came true."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from spec_rollout.records import StepStats

PRIOR_RATE = 0.7
"""Acceptance of a draft that nothing is known about; SmartSpec (arXiv 2406.14066) starts there too."""
PRIOR_WEIGHT = 4.0
"""Rows that the prior counts for, at each position."""
DECAY = 0.97
"""Expected fall of the rate from one position to the next, until the next has been reached often enough."""
MEMORY = 100.0
"""Steps that one row's outcomes count for; b rows forget √b times as fast (see `AcceptanceModel`)."""


def expected_curve(rates: Sequence[float]) -> np.ndarray:
    """Tokens [N + 1] that one row emits per step with γ = 0 … N, from the conditional acceptance `rates` [N]:
    1 + Σ_k Π_{i≤k} a_i."""
    return 1.0 + np.concatenate(([0.0], np.cumsum(np.cumprod(rates))))


class AcceptanceModel:
    """Conditional acceptance rates a_i = P(guess i accepted | all before it were), with exponential forgetting.

    Each position counts rows that reached it and rows that accepted there. Its prior is DECAY times the rate of the
    position before, so that positions which were never (or long not) reached follow those that are. The memory,
    MEMORY / √rows steps, is the steady state of a Kalman filter for a rate that wanders at random: more rows measure
    each step better and allow following it faster.
    """

    def __init__(self):
        self._reached: list[float] = []
        self._accepted: list[float] = []

    def observe(self, stats: StepStats) -> None:
        """Count the outcomes of a step; steps without guesses say nothing."""
        if stats.rows < 1 or stats.gamma < 1:
            return
        keep = math.exp(-math.sqrt(stats.rows) / MEMORY)
        missing = stats.gamma - len(self._reached)
        reached = [keep * n for n in self._reached] + [0.0] * missing
        accepted = [keep * n for n in self._accepted] + [0.0] * missing
        rows = stats.rows
        for i, count in enumerate(stats.accepted[: stats.gamma]):
            reached[i] += rows
            rows = min(max(count, 0), rows)
            accepted[i] += rows
        self._reached, self._accepted = reached, accepted

    def rates(self, gamma: int) -> list[float]:
        """The conditional acceptance rates of positions 1 … gamma."""
        rates, rate = [], PRIOR_RATE / DECAY
        for i in range(gamma):
            rate *= DECAY
            if i < len(self._reached):
                rate = (self._accepted[i] + PRIOR_WEIGHT * rate) / (self._reached[i] + PRIOR_WEIGHT)
            rates.append(rate)
        return rates

    def expected_tokens(self, gamma: int) -> float:
        """Tokens that one row emits per step with `gamma` guesses: 1 + Σ_k Π_{i≤k} a_i."""
        return float(self.expected_curve(gamma)[gamma])

    def expected_curve(self, max_gamma: int) -> np.ndarray:
        """`expected_tokens` [max_gamma + 1] for γ = 0 … max_gamma."""
        return expected_curve(self.rates(max_gamma))

    def reset(self, weight: float = 0.0) -> None:
        """Let what was observed count for at most `weight` rows per position; 0 forgets it."""
        for i, reached in enumerate(self._reached):
            scale = min(1.0, weight / reached) if reached > 0 else 0.0
            self._reached[i] *= scale
            self._accepted[i] *= scale

    def to_json(self) -> dict:
        return {"reached": list(self._reached), "accepted": list(self._accepted)}

    @classmethod
    def from_json(cls, state: dict) -> AcceptanceModel:
        model = cls()
        model._reached, model._accepted = list(state["reached"]), list(state["accepted"])
        return model
