"""What can guess, each with a controller of its own, and which of them a rollout is predicted to be fastest with."""

from __future__ import annotations

from collections.abc import Sequence

from spec_rollout.backends.calibration import measured_cost
from spec_rollout.config import SpecConfig
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.protocols import Drafter
from spec_rollout.gamma import FixedGamma, GammaController
from spec_rollout.gamma.acceptance import PRIOR_RATE, expected_curve
from spec_rollout.gamma.saving import RolloutValue
from spec_rollout.records import Controller, StepStats


class Source:
    """A drafter and the controller that decides how far it guesses, from its own costs and acceptance.

    Attributes:
        controller: None until `calibrate`, unless the number of guesses is fixed.
        watched: the controller, or who stands before it: what the engine asks.
    """

    def __init__(self, config: SpecConfig):
        self.config = config
        fixed = config.num_speculative_tokens
        self.controller: GammaController | FixedGamma | None = FixedGamma(fixed) if fixed else None
        self.watched: Controller | None = self.controller
        self.drafter: Drafter | None = None
        self._state: dict | None = None
        self._calibrated: tuple[int, dict | None] = 0, None
        """Rows, and shape of the drafter, that costs were measured for."""

    def calibrate(self, engine: RolloutEngine, slots: int) -> None:
        """Measure what steps cost, once and again when there are more rows or the drafter has another shape; from then
        on the controller chooses."""
        rows, shape = self._calibrated
        if isinstance(self.controller, FixedGamma) or (slots <= rows and self.drafter.shape == shape):
            return
        engine.drafter = self.drafter
        cost = measured_cost(engine, slots, self.config.widest, self.config.calibration_cache)
        self._calibrated = slots, self.drafter.shape
        if self.controller is not None:
            self.controller.cost = self.controller.cost.remeasured(cost)
            return
        self.controller = self.watched = GammaController(cost, self.config.widest)
        if "cost" in (self._state or {}):
            self.controller.load_state_dict(self._state)

    def state_dict(self) -> dict | None:
        """Of the controller, as it was loaded if there is none yet."""
        return self._state if self.controller is None else self.controller.state_dict()

    def load_state_dict(self, state: dict | None) -> None:
        """For the controller when it is made; a fixed one goes on."""
        self._state = state
        if self.config.num_speculative_tokens is None:
            self.controller = self.watched = None
            self._calibrated = 0, None

    def seconds(self, trace: Sequence[StepStats], rates: Sequence[float]) -> float:
        """What rollouts like those of `trace` would take with acceptance `rates`, PRIOR_RATE where they are unknown;
        at a fixed number of guesses, verify passes per token."""
        rates = rates or [PRIOR_RATE]
        if isinstance(self.controller, FixedGamma):
            gamma = self.controller.gamma
            return 1 / float(expected_curve([rates[min(i, len(rates) - 1)] for i in range(gamma)])[gamma])
        return RolloutValue(self.controller.cost, trace, self.config.widest).seconds(rates)
