"""Rollouts on vLLM: its engine, our draft head, which learns from the trainer's own forward passes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from spec_rollout.backends.embedded import COLDEST
from spec_rollout.backends.vllm.calibration import measured_cost
from spec_rollout.backends.vllm.delivery import Delivery, Whole
from spec_rollout.backends.vllm.engine import EngineRestarted, VLLMEngine
from spec_rollout.backends.vllm.starting import StartEngine, started
from spec_rollout.backends.vllm.steady import steady_number
from spec_rollout.backends.vllm.steps import Plain
from spec_rollout.backends.vllm.stopped import cut
from spec_rollout.config import SpecConfig
from spec_rollout.draft.learner import DraftLearner
from spec_rollout.draft.mtp import MtpHead
from spec_rollout.draft.mtp_checkpoint import add_to_policy, with_further
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.tap import FeatureTap
from spec_rollout.draft.watchman import Watchman
from spec_rollout.engine.noise import request_keys
from spec_rollout.engine.stops import criteria_of
from spec_rollout.gamma import FixedGamma, GammaController
from spec_rollout.gamma.saving import RolloutValue
from spec_rollout.records import Completion, RefreshStats, RolloutStats, SamplingParams, StepStats

MOST_RESTARTS = 3
"""Attempts at one rollout."""


class VLLMBackend:
    """Speculative rollouts of `model` by vLLM.

    With coupled verification completions are those of plain decoding and of the embedded engine, up to rounding, at
    any temperature. By rejection sampling, greedy ones are; others have the policy's distribution, but are drawn from
    vLLM's random stream: other tokens with speculation than without.

    Args:
        model: the unwrapped policy; the same object in every step.
        start: starts the engine, at the first rollout.
        seed: of the head's initial weights and of its training order.
        whole: within it all weights that a head reads are whole, of a policy in pieces; all ranks enter it together.

    Attributes:
        tokenizer: to match stop strings by, if there are any; to be set by the owner.
        policy_version: to be changed by the owner whenever the policy's weights have changed.
    """

    def __init__(
        self, model: nn.Module, config: SpecConfig, start: StartEngine, *, seed: int = 0, whole: Whole = nullcontext
    ):
        self.model, self.config, self.start, self.whole = model, config, start, whole
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.policy_version = 0
        self.engine: VLLMEngine | None = None
        self.stats = RolloutStats()
        fixed = config.num_speculative_tokens
        self.controller: GammaController | FixedGamma | None = FixedGamma(fixed) if fixed else None
        self.learner: DraftLearner | None = None
        self.tap: FeatureTap | None = None
        self._controller_state: dict | None = None
        self._watchman: Watchman | None = None
        self._watched = 0
        self._trace: list[StepStats] = []
        self._step_began: float | None = None
        self.delivery = Delivery()
        self.steady: int | None = None
        """Guesses of every step where their number must not change."""
        if fixed != 0:
            with whole():
                self.learner = DraftLearner(PolicyView(model), config, next(model.parameters()).device, seed)
            if config.draft_model_path:
                self.load(config.draft_model_path, resume=False)
            self.steady = steady_number(model, self.learner.head, config)

    @property
    def draft_version(self) -> int:
        """Trainings that the head has been through."""
        return self.learner.version if self.learner else 0

    @property
    def draft_healthy(self) -> bool:
        """False while the draft is off: it broke, was lost on the way to vLLM, or its acceptance fell to chance."""
        alarm = self.delivery.lost or (self._watchman.alarm if self._watchman else None)
        return alarm is None and (self.learner is None or self.learner.healthy)

    def take_stats(self) -> RolloutStats:
        """Statistics of the rollouts since the last call."""
        stats, self.stats = self.stats, RolloutStats()
        return stats

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        *,
        seed: Sequence[int] = (0,),
        max_new_tokens: Sequence[int] | None = None,
        collect: bool = True,
    ) -> list[Completion]:
        """One completion per prompt entry, in order, of at most `max_new_tokens`. Coupled draws follow from `seed`
        and the weights; by rejection sampling from batch and numbers of guesses too, or a server's stream.
        `collect=False`: they are not training's.
        """
        self._step_began = self._step_began or time.perf_counter()
        params = params or SamplingParams()
        ends = criteria_of(params, self.tokenizer)
        self._start()
        began = time.perf_counter()
        completions = cut(self._draw(prompts, params, seed, max_new_tokens), prompts, ends)
        self.stats.seconds += time.perf_counter() - began
        steps, prefill_s = self.engine.take_steps()
        self.stats.steps += steps
        self.stats.prefill_s += prefill_s
        self.stats.near_ties += self.engine.near_ties()
        if collect and self.learner is not None:
            self.learner.temperature = max(params.temperature, COLDEST)
            self._trace += steps
        self._calibrate()
        self.engine.sleep()
        return completions

    def deliver(self) -> None:
        """Have vLLM, which is started where that is to come, hold policy and draft as they are now.

        Raises:
            EngineRestarted: vLLM was restarted meanwhile.
        """
        self._step_began = self._step_began or time.perf_counter()
        self._start()
        self.delivery.push(self.engine, self.learner, (self.policy_version, self.draft_version), self.whole)
        if self.config.verification is None:
            self.delivery.tell_verification(self.engine)
        self._stand_watch()

    def _draw(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        seed: Sequence[int],
        limits: Sequence[int] | None,
    ) -> list[Completion]:
        """Draw, again if vLLM was restarted meanwhile: a completion is of one policy, and counted once."""
        for _ in range(MOST_RESTARTS):
            try:
                self.deliver()
                keys = request_keys(seed, max(len(prompts), 1))
                torch.manual_seed(keys[0][0] & 0x7FFFFFFF)  # the stream of a vLLM in here that does not go by keys
                return self.engine.generate(prompts, params, limits, keys[: len(prompts)])
            except EngineRestarted as error:
                warnings.warn(f"{error} The rollout is drawn again.", RuntimeWarning, stacklevel=4)
        raise ConnectionError(
            f"vLLM was restarted in each of {MOST_RESTARTS} attempts at one rollout: see its own log."
        )

    @contextmanager
    def listen(self, ids: Tensor, mask: Tensor, prompts: Sequence[int]) -> Iterator[None]:
        """Within it the policy reads the rollouts `ids` [N, T] with `mask` [N, T]; see `FeatureTap.listen`."""
        if self.learner is None or not self.config.draft_refresh:
            yield
            return
        self.tap = self.tap or FeatureTap(self.model, self.learner.head.config.aux_layers)
        with self.tap.listen(self.learner.buffer, ids, mask, prompts):
            yield

    def refresh(self, seconds: float | None = None, *, remaining: int | None = None) -> RefreshStats:
        """Train the head on what `listen` has heard since the last call; see `EmbeddedBackend.refresh`."""
        if self.learner is None or not self.config.draft_refresh or self._step_began is None:
            return RefreshStats(draft_version=self.draft_version)
        now = time.perf_counter()
        self.learner.budget.earn(now - self._step_began)
        value = None
        if isinstance(self.controller, GammaController) and seconds is None:
            value = RolloutValue(self.controller.cost, self._trace, self.config.widest)
        self._trace = []
        with self.whole():
            stats = self.learner.refresh(seconds, remaining, value)
        if stats.steps and self.controller is not None:
            self.controller.draft_changed()
        self._step_began = time.perf_counter()
        return stats

    def save(self, folder: str | Path) -> None:
        """Write the draft and the controller's tables to `folder` (safetensors and json); nothing without a head."""
        if self.learner is not None:
            state = self._controller_state if self.controller is None else self.controller.state_dict()
            self.learner.save(folder, {"vllm": state})  # what steps cost here is not what they cost elsewhere

    def save_with_policy(self, folder: str | Path) -> None:
        """As `EmbeddedBackend.save_with_policy`."""
        if self.learner is not None and isinstance(self.learner.head, MtpHead):
            dtype = next(self.model.parameters()).dtype
            add_to_policy(folder, with_further(self.learner.head, self.learner.mtp, dtype))

    def load(self, folder: str | Path, resume: bool = True) -> None:
        """Take what `save` wrote, or an EAGLE-3 head from elsewhere; only the head with `resume=False`.

        Raises:
            ValueError: nothing there can be read, or it was made for another policy.
        """
        if self.learner is None:
            return
        self._controller_state = (self.learner.load(folder, resume) or {}).get("vllm")
        self.tap = self._watchman = self.delivery.pushed = None
        if self.config.num_speculative_tokens is None:
            self.controller = None

    def _start(self) -> None:
        self.engine = self.engine or started(self.start, self.learner, self.config, self.steady)

    def _stand_watch(self) -> None:
        """Let the controller choose, behind a watchman, while there is a draft that can guess."""
        learner = self.learner
        if learner is None or not learner.trained or self.delivery.lost:
            self._watchman = None
            self.engine.control(Plain())
            return
        self._calibrate()
        if self._watchman is None or self._watched != self.draft_version:
            expected = learner.acceptance[0] if learner.acceptance else None
            refreshes, decides = self.config.draft_refresh, self.engine.live_schedule
            self._watchman = Watchman(self.controller, learner.head, expected, refreshes, decides)
            self._watched = self.draft_version
        self.controller.draft_ready = True
        self.engine.control(self._watchman)

    def _calibrate(self) -> None:
        """Measure what vLLM's steps cost, once, while it is awake."""
        if self.controller is not None or self.learner is None:
            return
        if not self.engine.live_schedule:
            self.controller = FixedGamma(self.steady or self.config.widest)  # what vLLM was started with decides
            return
        self.controller = GammaController(measured_cost(self.engine, self.config), self.config.widest)
        if "cost" in (self._controller_state or {}):
            self.controller.load_state_dict(self._controller_state)
