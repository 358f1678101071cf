"""What better guesses would save: the seconds of a rollout under other acceptance rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from spec_rollout.gamma.acceptance import PRIOR_RATE, expected_curve
from spec_rollout.gamma.cost_model import CostModel
from spec_rollout.records import StepStats

LEAST_STEP, BEST_RATE = 0.05, 0.98


class RolloutValue:
    """What a higher acceptance rate is worth on rollouts like the one that took `steps`.

    Args:
        cost: predicts the seconds of a step.
        steps: of a rollout; what it drew at each number of active rows is drawn again, at the best γ there.
        max_gamma: the most guesses per step.
        otherwise: seconds that the rollout takes at most, with another draft, or with another one beside this one of
            so many acceptance rates.
    """

    def __init__(
        self,
        cost: CostModel,
        steps: Sequence[StepStats],
        max_gamma: int,
        otherwise: Callable[[Sequence[float]], float] | None = None,
    ):
        self.max_gamma, self.otherwise = max_gamma, otherwise
        emitted: dict[int, int] = {}
        context: dict[int, int] = {}
        for step in steps:
            emitted[step.rows] = emitted.get(step.rows, 0) + step.emitted
            context[step.rows] = max(context.get(step.rows, 0), step.context)
        self._drawn = np.array(list(emitted.values()), dtype=float)  # [N] tokens
        self._speeds = np.array(
            [rows / cost.step_seconds(rows, max_gamma, context[rows])[0] for rows in emitted]
        ).reshape(-1, max_gamma + 1)  # [N, max_gamma + 1], tokens per second if no guess came true

    def seconds(self, rates: Sequence[float]) -> float:
        """Seconds of the rollout under conditional acceptance `rates` (the last one goes on; none: plain
        decoding), never more than those of plain decoding or `otherwise`."""
        bound = math.inf if self.otherwise is None else self.otherwise(rates)
        rates = [rates[min(i, len(rates) - 1)] if rates else 0.0 for i in range(self.max_gamma)]
        seconds = float((self._drawn / (self._speeds * expected_curve(rates)).max(axis=1)).sum())
        return min(seconds, bound)

    def hope(self, rates: Sequence[float]) -> float:
        """Seconds saved by going on from `rates` to what trained heads usually reach, or a little beyond."""
        step = _step(rates)
        better = [max(rate, min(rate + step, BEST_RATE)) for rate in rates]
        return self.seconds(rates) - self.seconds(better)

    def slope(self, rates: Sequence[float]) -> float:
        """Seconds saved per unit of acceptance rate, all positions moving alike.

        Below some rate speculation does not pay and a small gain saves nothing, though it leads to where it does. So
        this is the chord from `rates` to where `hope` looks.
        """
        return self.hope(rates) / _step(rates)


def _step(rates: Sequence[float]) -> float:
    return max(PRIOR_RATE - rates[0], LEAST_STEP)
