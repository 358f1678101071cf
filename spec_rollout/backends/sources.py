"""What can guess, each with a controller of its own, and which of them a rollout is predicted to be fastest with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from spec_rollout.backends.calibration import measured_cost
from spec_rollout.config import SpecConfig
from spec_rollout.draft.collector import Collector, nobody
from spec_rollout.draft.draft_model import is_language_model, load_draft_model
from spec_rollout.draft.model_drafter import ModelDrafter
from spec_rollout.draft.ngrams import History
from spec_rollout.draft.self_drafter import SelfDrafter
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


class NgramSource(Source):
    """What followed the same tokens in the earlier rollouts of `history`."""

    def __init__(self, config: SpecConfig, history: History):
        super().__init__(config)
        self.history = history

    def expected_seconds(self, engine: RolloutEngine, slots: int, trace: Sequence[StepStats]) -> float:
        """What rollouts like those of `trace` would take; infinite while there is no earlier one."""
        if not self.history:
            return math.inf
        self.calibrate(engine, slots)
        return self.history.seconds + self.seconds(trace, self.history.acceptance)


class ModelSource(Source):
    """A draft model, or the policy itself in 8 bit: it guesses from the first rollout on, and learns nothing."""

    drafter: SelfDrafter | ModelDrafter | None

    def expected_seconds(self, engine: RolloutEngine, slots: int, trace: Sequence[StepStats]) -> float:
        """What rollouts like those of `trace` would take, with reading the policy's weights where they have changed;
        infinite where plain decoding would take no longer, and where there is no such model."""
        if self.drafter is None:
            return math.inf
        self.calibrate(engine, slots)
        if isinstance(self.controller, FixedGamma):
            return self.seconds(trace, [])
        to_read = self.drafter.renew_s if isinstance(self.drafter, SelfDrafter) and self.drafter.stale else 0.0
        seconds = self.seconds(trace, self.controller.acceptance.rates(self.config.widest)) + to_read
        plain = RolloutValue(self.controller.cost, trace, self.config.widest).seconds([])
        return seconds if seconds < plain or not trace else math.inf

    def collect_with(self, collector: Collector | None) -> None:
        """The head's `collector` gathers features while this one guesses; None, and nobody does."""
        if self.drafter is not None:
            self.drafter.collector = collector or nobody()

    def policy_changed(self) -> None:
        """A copy of the policy is made anew before the next rollout that guesses with it; a draft model stays."""
        if isinstance(self.drafter, SelfDrafter):
            self.drafter.stale = True


def model_source(config: SpecConfig, engine: RolloutEngine, tokenizer: PreTrainedTokenizerBase | None) -> ModelSource:
    """With the model that `config` gives to guess with besides a head; with none where it gives none, or nothing is to
    be guessed.

    Raises:
        ValueError: it cannot guess for this policy.
    """
    source, path = ModelSource(config), config.draft_model_path
    if config.num_speculative_tokens == 0:
        return source
    if config.draft_quantized:
        source.drafter = SelfDrafter(engine.target)
    elif path and is_language_model(path):
        source.drafter = ModelDrafter(load_draft_model(path, engine.target, tokenizer))
    return source
