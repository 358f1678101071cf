"""A rollout that is looked at whenever its rows have changed."""

from __future__ import annotations

from typing import ClassVar

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
