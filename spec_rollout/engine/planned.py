"""A step in which confidence decides how far to guess, as the decode loop meets it."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from spec_rollout.engine.verify import Verdict
from spec_rollout.records import StepPlan, StepStats


class PlannedStep:
    """Hands the guesses of one step to its `plan`. Its numbers are read on the host: for guesses made on a CPU."""

    def __init__(self, plan: StepPlan):
        self.plan = plan

    def further(self, probabilities: Tensor) -> bool:
        """Whether to guess on, after a guess for each row that had `probabilities` [B] by the draft."""
        return self.plan.further(probabilities.numpy())

    def trim(self, guesses: Tensor) -> Tensor:
        """Of all `guesses` [B, depth] made, those [B, γ] to verify."""
        self._made = guesses.numpy()
        return guesses[:, : self.plan.verified()]

    def account(self, samples: Tensor, report: Verdict, step: StepStats) -> StepStats:
        """Tell the plan what came of its guesses, and put it into `step`. The last of `samples` [B, γ + 1] judges one
        guess more than was verified."""
        width = min(samples.shape[1], self._made.shape[1])
        equal = samples[:, :width].numpy() == self._made[:, :width]
        ended = (report.ended | report.full).astype(bool)
        true = np.where(ended, report.accepted, equal.cumprod(1).sum(1))
        step.judged = self.plan.learn(samples.shape[1] - 1, true, ended)
        step.depth = self.plan.depth
        return step
