"""How long the draft head may train: a share of the run's time, spent while it saves more than it costs."""

from __future__ import annotations

HORIZON = 100
"""Most rollouts over which a gain in acceptance counts: later the policy has moved on."""
UNKNOWN_LENGTH = 100
"""Rollouts that a run is taken to have ahead of it when its trainer does not say."""
YOUNG_SHARE = 0.15
"""Of what is left for the run, that one training of a head which still learns to guess may take: what it learns early
serves longest. With 70 % a head learns no more by the fifth rollout, few rollouts being little to learn from, and then
has nothing left to go on and to follow the policy."""
FIRST_SHARE = 0.3
"""The same for the run's first training: where only a rollout has been timed by then, a step counts for less than it
takes."""
EVEN = 2
"""Times an even share of what is left that any training may take."""
LEAST_LEVEL = 0.125
"""Share of the overhead that is spent even when the last training did not pay, to notice when it does."""


class RefreshBudget:
    """Seconds of training per rollout.

    The run earns `overhead` of its time for the draft, what is to come included. A young head may spend a good part of
    what is left of that, a settled one spreads it over the rollouts to come. Each training tells what it cost and what
    its gain is worth over the next rollouts: if it paid, the next one may take twice as long; if not, the next one
    waits until a small share of the overhead has paid for it.
    """

    def __init__(self, overhead: float):
        self.overhead = overhead
        self.elapsed = 0.0
        """Seconds of the run that have earned."""
        self.spent = 0.0
        self.step_seconds = 0.0
        """Of one step of the run, smoothed."""
        self.wish: float | None = None
        """Seconds that the next training may take by what the last one brought; None before the first."""

    def earn(self, seconds: float) -> None:
        """One step of the run, rollout and all, took `seconds`."""
        self.elapsed += seconds
        self.step_seconds = seconds if not self.step_seconds else 0.8 * self.step_seconds + 0.2 * seconds
        if self.wish is not None:
            self.wish += LEAST_LEVEL * self.overhead * seconds

    def seconds(self, remaining: int | None, settled: bool = False) -> float:
        """What the next training may take, with `remaining` rollouts of the run still to come, of a head that has
        `settled` or still learns to guess."""
        ahead = UNKNOWN_LENGTH if remaining is None else remaining
        if ahead == 0:
            return 0.0
        left = self.overhead * (self.elapsed + ahead * self.step_seconds) - self.spent
        even = min(1.0, EVEN / (ahead + 1))
        young = YOUNG_SHARE if self.spent else FIRST_SHARE
        funds = left * (even if settled else max(even, young))
        return max(0.0, funds if self.wish is None else min(funds, self.wish))

    def worth(self, seconds_per_rollout: float, remaining: int | None) -> float:
        """Seconds that a saving of `seconds_per_rollout` comes to."""
        return seconds_per_rollout * min(HORIZON, UNKNOWN_LENGTH if remaining is None else remaining)

    def spend(self, seconds: float, worth: float) -> None:
        """A training took `seconds` and brought what saves `worth` seconds."""
        self.spent += seconds
        if seconds > 0:
            self.wish = 2 * seconds if worth > seconds else 0.0

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        for name in ("elapsed", "spent", "step_seconds", "wish"):
            setattr(self, name, state[name])
