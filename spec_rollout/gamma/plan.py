"""How far each row of one step guesses, decided by the guesses' own confidence as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spec_rollout.gamma.confidence import Confidence


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
    share of the pass in seconds. With coupled verification no choice, of whatever confidence, changes a token.

    Args:
        rates: [γ] acceptance by place, for guesses that are not made yet.
        ragged: whether a pass of unlike rows costs what its tokens cost; else all rows verify equally many.
    """

    def __init__(self, confidence: Confidence, rates: Sequence[float], prices: Prices, rows: int, ragged: bool):
        self.confidence, self.prices, self.rows, self.ragged = confidence, prices, rows, ragged
        self.widest = len(rates)
        self._rates = np.asarray(rates)
        verifying = prices.verifying
        self._price = prices.worth * (verifying[-1] - verifying[rows]) / max(1, len(verifying) - 1 - rows)
        self._probabilities: list[np.ndarray] = []
        self._survival: list[np.ndarray] = []

    @property
    def depth(self) -> int:
        """Guesses made so far in each row."""
        return len(self._survival)

    def further(self, probabilities: np.ndarray) -> bool:
        """Whether to guess on, after a guess for each row to which the draft gave `probabilities` [B]."""
        chances = self.confidence.chances(self.depth, probabilities)
        self._probabilities.append(probabilities)
        self._survival.append(self._survival[-1] * chances if self._survival else chances)
        depth = self.depth
        if depth >= self.widest:
            return False
        ahead = self._survival[-1][:, None] * np.cumprod(self._rates[depth:])  # [B, what is left]
        gain = np.maximum(ahead - self._price, 0).sum(0) if self.ragged else ahead.sum(0) - self.rows * self._price
        drafting = self.prices.drafting
        cost = self.prices.worth * (drafting[depth + 1 :] - drafting[depth])
        return bool((np.cumsum(gain) - cost).max() > 0)

    def budgets(self) -> np.ndarray:
        """Guesses [B] to verify of each row."""
        survival = np.stack(self._survival, 1)  # [B, depth], never rising along a row
        if not self.ragged:
            tokens = np.concatenate([[0.0], np.cumsum(survival.sum(0))])
            cost = self.prices.verifying[self.rows * np.arange(self.depth + 1)]
            return np.full(self.rows, int((tokens - self.prices.worth * cost).argmax()))
        ranked = np.sort(survival, axis=None)[::-1]
        tokens = np.concatenate([[0.0], np.cumsum(ranked)])
        most = int((tokens - self.prices.worth * self.prices.verifying[: len(tokens)]).argmax())
        return (survival >= ranked[most - 1]).sum(1) if most else np.zeros(self.rows, dtype=np.int64)

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
