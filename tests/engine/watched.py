"""A rollout that is looked at whenever its rows have changed."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from spec_rollout.engine.rollout import Rollout


class Watched(Rollout):
    """Calls `check`; counts in `moves` the rows that moved to another slot, over all rollouts."""

    moves: ClassVar[int] = 0

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        honest = self.seats.copy

        def copy(source, target, move=False):
            type(self).moves += move * len(source)
            honest(source, target, move)

        self.seats.copy = copy

    def admit(self) -> float:
        seconds = super().admit()
        self.check()
        return seconds

    def finish_step(self, gamma):
        step = super().finish_step(gamma)
        self.check()
        return step

    def check(self) -> None:
        raise NotImplementedError


def assert_alike(mine: Tensor, theirs: Tensor) -> None:
    """Up to 1e-5 of the largest number: keys and states are sums of numbers as large as that, so that the small ones
    carry the same rounding as the large ones. The absolute difference was up to 3e-5, where numbers are up to 38."""
    torch.testing.assert_close(mine, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
