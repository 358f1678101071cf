"""How far each row of one step guesses, decided by the guesses' own confidence as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spec_rollout.gamma.confidence import Confidence

EMPTY_PLACE = 0.25
"""What a pass over unlike rows pays for a place of its rectangle that holds no guess, as a share of one that does: the
attention kernel reads it. Measured 0 to 0.45 with the small policy of the documentation, less with larger ones."""


@dataclass(frozen=True)
class Prices:
    """What a step of b rows costs, in seconds, and what a second is worth.

    Attributes:
        verifying [b · γ + 1]: a pass in which 0, 1, 2 … guesses are verified over all rows; never falling.
        drafting [γ + 1]: guessing 0, 1, 2 … tokens for every row.
        worth: tokens that a second brings otherwise.
    """

    verifying: np.ndarray
    drafting: np.ndarray
    worth: float


class Plan:
    """For one step: after each guess whether to guess further, in the end which guesses are verified.

    A guess survives if it and all before it come true. It is worth its chance of surviving in tokens, and costs its
    share of the pass in seconds. The next round of guesses is made if what is to be hoped of it pays for it; further
    ones are worth less and cost the same. With coupled verification no choice, by whatever confidence, costs a token.

    Args:
        rates: [γ] acceptance by place, for guesses that are not made yet.
        ragged: whether a pass of unlike rows costs what its tokens cost; else all rows verify equally many.
    """

    def __init__(self, confidence: Confidence, rates: Sequence[float], prices: Prices, rows: int, ragged: bool):
        self.confidence, self.prices, self.rows = confidence, prices, rows
        self.ragged = ragged and rows > 1
        self.widest = len(rates)
        self._rates = rates
        verifying, drafting = prices.verifying, prices.drafting
        price = prices.worth * (verifying[-1] - verifying[rows]) / max(1, len(verifying) - 1 - rows)
        fixed = (EMPTY_PLACE if self.ragged else 1.0) * price
        self._price = price - fixed
        guess = (drafting[-1] - drafting[1]) / (len(drafting) - 2) if len(drafting) > 2 else 0.0
        self._least = rows * fixed + prices.worth * guess
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
        if depth + 1 >= self.widest:
            return False
        hope = survival * self._rates[depth + 1]
        if self._price:
            hope -= self._price
            np.maximum(hope, 0.0, out=hope)
        return bool(hope.sum() > self._least)

    def budgets(self) -> np.ndarray:
        """Guesses [B] to verify of each row."""
        survival = np.stack(self._survival, 1)  # [B, depth], never rising along a row
        cost = self.prices.worth * self.prices.verifying
        alike = np.concatenate([[0.0], np.cumsum(survival.sum(0))]) - cost[self.rows * np.arange(self.depth + 1)]
        width = int(alike.argmax())
        found, best = np.full(self.rows, width), alike[width]
        for width in range(1, self.depth + 1) if self.ragged else ():
            ranked = np.sort(survival[:, :width], axis=None)[::-1]
            counts = np.arange(1, len(ranked) + 1)
            paid = (counts + EMPTY_PLACE * (len(ranked) - counts)).astype(np.int64)
            value = np.cumsum(ranked) - cost[paid]
            most = int(value.argmax())
            if value[most] > best:
                found, best = (survival[:, :width] >= ranked[most]).sum(1), value[most]
        return found

    def learn(self, budgets: np.ndarray, true: np.ndarray, ended: np.ndarray) -> list[tuple[int, int]]:
        """Calibrate by what came of the guesses; returns for each place the guesses judged and come true.

        The pass samples one token beyond the guesses that it verifies, so the next one is judged too.

        Args:
            budgets: [B] what was verified.
            true: [B] guesses come true, one more than `budgets` at most.
            ended: [B] bool, rows of which nothing is known beyond what came true.
        """
        place = np.arange(self.depth)
        come = place < true[:, None]
        judged = come | ((place == true[:, None]) & (place <= budgets[:, None]) & ~ended[:, None])
        self.confidence.observe(np.stack(self._probabilities, 1), judged, come)
        return list(zip(judged.sum(0).tolist(), come.sum(0).tolist(), strict=True))
