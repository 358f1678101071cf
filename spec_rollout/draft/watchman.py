"""Notices a draft that has stopped working, and keeps it from guessing until it has learned again."""

from __future__ import annotations

import warnings

from spec_rollout.draft.eagle import EagleHead
from spec_rollout.records import Controller, StepStats

WATCHED = 256
"""First guesses that are judged together: four steps of 64 rows."""
FALLEN = 0.25
"""Share of the acceptance that a head had when it was trained, below which it is no longer the same head's."""
CHANCE = 0.05
"""Acceptance below which a head of unknown quality is taken to guess blindly."""


class Watchman:
    """Stands before a `controller`: γ is 0 from the moment that acceptance has fallen to chance.

    Training, loading or syncing can leave a head without effect on any sample but useless: weights that are lost, not
    finite, or of another policy.

    Args:
        controller: decides while all is well.
        head: is looked through for the cause.
        expected: acceptance rate of the first guess when the head was last trained; None if that is not known.
        learns: whether the head will be trained again, which ends the watch.
        decides: whether the engine asks for γ; some guess as they were started to, whatever the watch finds.
    """

    def __init__(
        self,
        controller: Controller,
        head: EagleHead,
        expected: float | None = None,
        learns: bool = True,
        decides: bool = True,
    ):
        self.controller, self.head, self.expected = controller, head, expected
        self.learns, self.decides = learns, decides
        self.alarm: str | None = None
        """What is wrong, once something is."""
        self._guesses = self._accepted = 0

    def choose(self, batch_size: int, context: int) -> int:
        return 0 if self.alarm else self.controller.choose(batch_size, context)

    def observe(self, stats: StepStats) -> None:
        self.controller.observe(stats)
        if not stats.gamma or self.alarm:
            return
        self._guesses += stats.rows
        self._accepted += stats.accepted[0]
        if self._guesses >= WATCHED:
            rate, self._guesses, self._accepted = self._accepted / self._guesses, 0, 0
            if rate < (CHANCE if self.expected is None else FALLEN * self.expected):
                self._raise_alarm(rate)

    def _raise_alarm(self, rate: float) -> None:
        before = "" if self.expected is None else f", after {self.expected:.0%} when it was trained"
        moved = "the policy has moved away from it, or it is not this policy's"
        cause = moved if self.head.finite else "its weights are not finite"
        self.alarm = f"{rate:.1%} of its first guesses came true{before}: {cause}"
        until = "until it has learned again" if self.learns else "for good, as draft_refresh=False"
        state = "is off (num_speculative_tokens=0)" if self.decides else "guesses in vain, as vLLM was started to,"
        warnings.warn(
            f"The draft head {state} {until}: {self.alarm}. No sample is affected.",
            RuntimeWarning,
            stacklevel=2,
        )
