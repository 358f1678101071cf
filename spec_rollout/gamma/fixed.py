"""The controller of a number of guesses that is given."""

from __future__ import annotations

from spec_rollout.records import StepStats


class FixedGamma:
    """Always the same γ; plain decoding while `draft_ready` is False."""

    def __init__(self, gamma: int):
        if gamma < 0:
            raise ValueError(f"gamma={gamma} is negative: give 0 for plain decoding or a positive number.")
        self.gamma = gamma
        self.draft_ready = True

    def choose(self, batch_size: int, context: int) -> int:
        return self.gamma if self.draft_ready else 0

    def observe(self, stats: StepStats) -> None:
        """Nothing to learn."""

    def draft_changed(self) -> None:
        """Nothing depends on the draft."""

    def schedule(self, max_batch_size: int, context: int) -> list[tuple[int, int, int]]:
        """As `GammaController.schedule`: one range."""
        return [(1, max_batch_size, self.choose(max_batch_size, context))]

    def state_dict(self) -> dict:
        return {"draft_ready": self.draft_ready}

    def load_state_dict(self, state: dict) -> None:
        self.draft_ready = state["draft_ready"]
