"""How far one step guesses, decided by the guesses' own confidence as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spec_rollout.gamma.confidence import Confidence


@dataclass(frozen=True)
class Prices:
    """What a step costs, in seconds, and what a second is worth.

    Attributes:
        verifying, drafting: [γ + 1] seconds of verifying and of making 0, 1, 2 … guesses for each row; never falling.
        worth: tokens that a second brings otherwise.
    """

    verifying: np.ndarray
    drafting: np.ndarray
    worth: float


class Plan:
    """For one step of `rows` rows: after each guess whether to guess further, in the end how many are verified.

    A guess survives if it and all before it come true. It is worth its chance of surviving in tokens, and costs its
    share of the step in seconds. The next round of guesses is made if what is to be hoped of it pays for it; further
    ones are worth less and cost the same. With coupled verification no choice, by whatever confidence, costs a token.

    Args:
        rates: [γ] acceptance by place, for guesses that are not made yet.
    """

    def __init__(self, confidence: Confidence, rates: Sequence[float], prices: Prices, rows: int):
        self.confidence, self.prices, self.rows = confidence, prices, rows
        self.widest = len(rates)
        self._rates = rates
        rounds = max(1, self.widest - 1)
        seconds = sum((cost[-1] - cost[1]) / rounds for cost in (prices.verifying, prices.drafting))
        self._least = prices.worth * seconds  # what one more round of guesses must bring
        self._probabilities: list[np.ndarray] = []
        self._survival: list[np.ndarray] = []

    @property
    def depth(self) -> int:
        """Guesses made so far in each row."""
        return len(self._survival)

    def further(self, probabilities: np.ndarray) -> bool:
        """Whether to guess on, after a guess for each row to which the draft gave `probabilities` [B]."""
        depth = len(self._survival)
        survival = self.confidence.chances(depth, probabilities)
        if depth:
            survival *= self._survival[-1]
        self._probabilities.append(probabilities)
        self._survival.append(survival)
        return depth + 1 < self.widest and bool(survival.sum() * self._rates[depth + 1] > self._least)

    def verified(self) -> int:
        """How many guesses of each row to verify."""
        tokens = np.cumsum([0.0, *(survival.sum() for survival in self._survival)])
        return int((tokens - self.prices.worth * self.prices.verifying[: self.depth + 1]).argmax())

    def learn(self, verified: int, true: np.ndarray, ended: np.ndarray) -> list[tuple[int, int]]:
        """Calibrate by what came of the guesses; returns for each place the guesses judged and come true.

        The pass samples one token beyond the guesses that it verifies, so the next one is judged too.

        Args:
            true: [B] guesses come true, at most one more than were `verified`.
            ended: [B] bool, rows of which nothing is known beyond what came true.
        """
        place = np.arange(self.depth)
        come = place < true[:, None]
        judged = come | ((place == true[:, None]) & (place <= verified) & ~ended[:, None])
        self.confidence.observe(np.stack(self._probabilities, 1), judged, come)
        return list(zip(judged.sum(0).tolist(), come.sum(0).tolist(), strict=True))
