"""A step in which confidence decides how far rows guess, as the decode loop meets it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spec_rollout.engine.verify import Verdict
from spec_rollout.records import StepPlan, StepStats


class Selection:
    """The tokens that a pass reads of a rectangle: of row n the newest one and its first `budgets` [B] guesses.

    Attributes:
        kept: [N] int64, ascending indices into B · `width`.
        chosen: [B, width] bool, the same.
    """

    def __init__(self, budgets: np.ndarray, width: int):
        chosen = np.arange(width) <= budgets[:, None]
        self.chosen, self.kept = torch.from_numpy(chosen), torch.from_numpy(np.flatnonzero(chosen))

    def take(self, values: Tensor | None) -> Tensor | None:
        """Of `values` [B, width, ...] what is kept, [1, N, ...]; of nothing, nothing."""
        return None if values is None else values.flatten(0, 1)[self.kept][None]

    def spread(self, values: Tensor) -> Tensor:
        """`values` [1, N] in their places, [B, width]; 0 elsewhere."""
        whole = values.new_zeros(self.chosen.numel())
        return whole.index_copy_(0, self.kept, values[0]).view(self.chosen.shape)


class PlannedStep:
    """Hands the guesses of one step to its `plan`. Its numbers are read on the host: for guesses made on a CPU.

    Attributes:
        selection: what the pass reads; None where all rows verify equally many guesses.
    """

    def __init__(self, plan: StepPlan):
        self.plan = plan
        self.selection: Selection | None = None
        self._offered: list[int] | None = None

    def further(self, probabilities: Tensor) -> bool:
        """Whether to guess on, after a guess for each row that had `probabilities` [B] by the draft."""
        return self.plan.further(probabilities.numpy())

    def trim(self, guesses: Tensor) -> Tensor:
        """Of all `guesses` [B, depth] made, those [B, γ] that the widest row verifies."""
        self._made, self._budgets = guesses.numpy(), self.plan.budgets()
        widest = int(self._budgets.max())
        if self._budgets.min() < widest:
            self.selection = Selection(self._budgets, widest + 1)
            self._offered = (self._budgets[:, None] > np.arange(widest)).sum(0).tolist()
        return guesses[:, :widest]

    def verified(self, guesses: Tensor) -> Tensor:
        """`guesses` [B, γ], -1 where the pass did not read them."""
        return guesses if self.selection is None else guesses.masked_fill(~self.selection.chosen[:, 1:], -1)

    def drafted(self) -> Tensor:
        """Guesses [B] verified of each row."""
        return torch.from_numpy(self._budgets)

    def account(self, samples: Tensor, report: Verdict, step: StepStats) -> StepStats:
        """Tell the plan what came of its guesses, and put it into `step`. A row's last sample judges one guess more
        than it verified."""
        width = min(samples.shape[1], self._made.shape[1])
        equal = samples[:, :width].numpy() == self._made[:, :width]
        equal &= np.arange(width) <= self._budgets[:, None]
        ended = (report.ended | report.full).astype(bool)
        true = np.where(ended, report.accepted, equal.cumprod(1).sum(1))
        step.judged = self.plan.learn(self._budgets, true, ended)
        step.depth, step.offered = self.plan.depth, self._offered
        return step
