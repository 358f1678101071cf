"""What can guess, each with a controller of its own, and which of them a rollout is predicted to be fastest with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from spec_rollout.backends.calibration import measured_cost
from spec_rollout.backends.trace import BOTH, HEAD, MODEL, NGRAMS
from spec_rollout.config import SpecConfig
from spec_rollout.draft.arbiter import joint_rates
from spec_rollout.draft.collector import Collector, nobody
from spec_rollout.draft.draft_model import is_language_model, load_draft_model
from spec_rollout.draft.model_drafter import ModelDrafter
from spec_rollout.draft.ngrams import History
from spec_rollout.draft.self_drafter import SelfDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.protocols import Drafter
from spec_rollout.gamma import FixedGamma, GammaController
from spec_rollout.gamma.acceptance import PRIOR_RATE, expected_curve
from spec_rollout.gamma.cost_model import CostModel
from spec_rollout.gamma.saving import RolloutValue
from spec_rollout.records import Controller, StepStats


class Source:
    """A drafter and the controller that decides how far it guesses, from its own costs and acceptance.

    Attributes:
        controller: None until `calibrate`, unless the number of guesses is fixed.
        watched: the controller, or who stands before it: what the engine asks.
        others: what else can guess for the same policy.
    """

    def __init__(self, config: SpecConfig):
        self.config = config
        fixed = config.num_speculative_tokens
        self.controller: GammaController | FixedGamma | None = FixedGamma(fixed) if fixed else None
        self.watched: Controller | None = self.controller
        self.drafter: Drafter | None = None
        self.others: list[Source] = []
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

    @property
    def cost(self) -> CostModel | None:
        """What steps take, in seconds; None where that is not known. Until it has guessed itself, what real steps of
        another source took counts, lest it looks faster for want of what no calibration shows."""
        own = self.controller.cost if isinstance(self.controller, GammaController) else None
        if own is None or own.learned:
            return own
        costs = [s.controller.cost for s in self.others if isinstance(s.controller, GammaController)]
        return next((cost.remeasured(own) for cost in costs if cost.learned), own)

    def draft_changed(self) -> None:
        """It guesses better or worse than before."""
        if self.controller is not None:
            self.controller.draft_changed()

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
        return self.seconds_of(trace)(rates or [PRIOR_RATE])

    def seconds_of(self, trace: Sequence[StepStats]) -> Callable[[Sequence[float]], float]:
        """`seconds` as a function of the rates."""
        cost = self.cost
        if cost is not None:
            return RolloutValue(cost, trace, self.config.widest).seconds
        gamma = self.controller.gamma
        return lambda rates: 1 / float(expected_curve([rates[min(i, len(rates) - 1)] for i in range(gamma)])[gamma])


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
        return self.update_s + self.seconds(trace, self.history.acceptance)

    @property
    def update_s(self) -> float:
        """What bringing the table up to date took; 0 at a fixed number of guesses, where times are told in passes."""
        return 0.0 if isinstance(self.controller, FixedGamma) else self.history.seconds


class JointSource(Source):
    """`head` and `ngrams` together: the head's drafter, with an arbiter between the two."""

    def __init__(self, config: SpecConfig, head: Source, ngrams: NgramSource):
        super().__init__(config)
        self.head, self.ngrams = head, ngrams

    def calibrate(self, engine: RolloutEngine, slots: int) -> None:
        """Nothing is measured besides what the two take alone."""
        for source in (self.head, self.ngrams):
            source.calibrate(engine, slots)
        if isinstance(self.controller, FixedGamma) or self._calibrated == self.head._calibrated:
            return
        self._calibrated = self.head._calibrated
        cost = self.ngrams.controller.cost.with_draft_of(self.head.controller.cost)
        if self.controller is None:
            self.controller = self.watched = GammaController(cost, self.config.widest)
        else:
            self.controller.cost = self.controller.cost.remeasured(cost)

    def expected_seconds(
        self, engine: RolloutEngine, slots: int, trace: Sequence[StepStats]
    ) -> Callable[[Sequence[float]], float]:
        """What rollouts like those of `trace` would take, from the acceptance rates of the head alone; infinite where
        either is missing, and where guesses must come from a distribution."""
        history = self.ngrams.history
        if not history or not history.acceptance or self.config.verification == "rejection":
            return lambda rates: math.inf
        self.calibrate(engine, slots)
        seconds = self.seconds_of(trace)
        return lambda rates: self.ngrams.update_s + seconds(joint_rates(rates, history.acceptance))


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
        plain = RolloutValue(self.cost, trace, self.config.widest).seconds([])
        return seconds if seconds < plain or not trace else math.inf

    def collect_with(self, collector: Collector | None) -> None:
        """The head's `collector` gathers features while this one guesses; None, and nobody does."""
        if self.drafter is not None:
            self.drafter.collector = collector or nobody()

    def policy_changed(self) -> None:
        """A copy of the policy is made anew before the next rollout that guesses with it; a draft model stays."""
        if isinstance(self.drafter, SelfDrafter):
            self.drafter.stale = True


class Sources:
    """All that can guess: a head, earlier rollouts, the two together, and a model that does not learn.

    Attributes:
        named: each by its name in traces.
    """

    def __init__(self, head: Source, ngrams: NgramSource, model: ModelSource, joint: JointSource):
        self.head, self.ngrams, self.model, self.joint = head, ngrams, model, joint
        self.named: dict[str, Source] = {NGRAMS: ngrams, BOTH: joint, HEAD: head, MODEL: model}
        for source in self.named.values():
            source.others = [other for other in self.named.values() if other is not source]

    def fastest(
        self, engine: RolloutEngine, slots: int, trace: Sequence[StepStats], rates: Sequence[float] | None
    ) -> str:
        """Who would take the least time for rollouts like those of `trace`, by name, if the head has acceptance
        `rates`; None where it cannot guess."""
        given = engine, slots, trace
        expected = {HEAD: math.inf} | self._without_head(*given)
        if rates is not None:
            expected |= {HEAD: self.head.seconds(trace, rates), BOTH: self.joint.expected_seconds(*given)(rates)}
        return min(expected, key=expected.__getitem__)

    def otherwise(
        self, engine: RolloutEngine, slots: int, trace: Sequence[StepStats]
    ) -> Callable[[Sequence[float]], float]:
        """The least time that any but the head alone would take, if the head had some acceptance rates."""
        given = engine, slots, trace
        least, together = min(self._without_head(*given).values()), self.joint.expected_seconds(*given)
        return lambda rates: min(least, together(rates))

    def _without_head(self, engine: RolloutEngine, slots: int, trace: Sequence[StepStats]) -> dict[str, float]:
        sources = ((NGRAMS, self.ngrams), (MODEL, self.model))
        return {name: source.expected_seconds(engine, slots, trace) for name, source in sources}


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
