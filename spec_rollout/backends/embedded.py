"""Rollouts in the trainer's own process: engine, draft head and controller put together."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from spec_rollout.backends.sources import JointSource, NgramSource, Source, Sources, model_source
from spec_rollout.config import SpecConfig
from spec_rollout.draft.arbiter import Arbiter
from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.learner import DraftLearner
from spec_rollout.draft.mtp import MtpDrafter, MtpHead
from spec_rollout.draft.mtp_checkpoint import add_to_policy, with_further
from spec_rollout.draft.ngram_drafter import NgramDrafter
from spec_rollout.draft.ngrams import History
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.watchman import Watchman
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.gamma import FixedGamma, GammaController
from spec_rollout.gamma.acceptance import PRIOR_RATE
from spec_rollout.gamma.saving import RolloutValue
from spec_rollout.records import Completion, RefreshStats, RolloutStats, SamplingParams, StepStats

COLDEST = 0.01
"""Temperature at which a distribution is as good as its best token."""


class EmbeddedBackend:
    """Speculative rollouts of `model`, the unwrapped policy, with a draft head that learns from them.

    Args:
        model: a Hugging Face causal language model; the same object in every step, its weights may change.
        config: options.
        tokenizer: needed for stop strings only.
        seed: of the head's initial weights and of its training order; it never reaches the samples.

    Raises:
        UnsupportedModelError: the model cannot be decoded on ragged rows.
        ValueError: the draft that `config` names is unreadable, made for another policy, or not to be had of this one.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SpecConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        seed: int = 0,
    ):
        self.config = config or SpecConfig()
        self.engine = RolloutEngine(model, self.config, tokenizer=tokenizer)
        self.learner: DraftLearner | None = None
        self.history = History(self.engine.target.device)
        self.head, self.ngrams = Source(self.config), NgramSource(self.config, self.history)
        self.model = model_source(self.config, self.engine, tokenizer)
        self.sources = Sources(self.head, self.ngrams, self.model, JointSource(self.config, self.head, self.ngrams))
        self._slots = 1
        """Rows that the rollouts had so far."""
        self._last_trace: list[StepStats] = []
        self._trace: list[StepStats] = []
        """Steps of the rollouts before the last call of `refresh`, and since."""
        self._step_began: float | None = None
        if self.config.num_speculative_tokens != 0:
            self.learner = DraftLearner(PolicyView(model), self.config, self.engine.target.device, seed)
            self.engine.beside = lambda: {"max_feature_tokens": self.learner.buffer.nbytes}
            self._take_head()
            if self.config.draft_model_path and self.model.drafter is None:
                self.load(self.config.draft_model_path, resume=False)

    @property
    def drafter(self) -> EagleDrafter | None:
        """The head's."""
        return self.head.drafter

    @property
    def controller(self) -> GammaController | FixedGamma | None:
        """The head's."""
        return self.head.controller

    @property
    def draft_version(self) -> int:
        """Trainings that the head has been through."""
        return self.learner.version if self.learner else 0

    @property
    def draft_healthy(self) -> bool:
        """False while the draft is off because it broke or its acceptance has fallen to chance, and where it broke
        within a rollout since `take_stats` was last called."""
        watchman = self.head.watched
        alarm = watchman.alarm if isinstance(watchman, Watchman) else None
        return alarm is None and not self.stats.drafter_failures and (self.learner is None or self.learner.healthy)

    @property
    def stats(self) -> RolloutStats:
        """Statistics of the rollouts since `take_stats` was last called."""
        return self.engine.stats

    @property
    def guesses_with_mtp(self) -> bool:
        """Whether the draft is the MTP head of the policy's checkpoint."""
        return self.learner is not None and isinstance(self.learner.head, MtpHead)

    def take_stats(self) -> RolloutStats:
        """Statistics of the rollouts since the last call."""
        stats, self.engine.stats = self.engine.stats, RolloutStats()
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
        """One completion per prompt entry, in order; see `RolloutEngine.generate`. `collect=False` keeps what is drawn
        out of the draft's training, as of an evaluation."""
        self._step_began = self._step_began or time.perf_counter()
        if self.learner is not None:
            self.drafter.collector.buffer = self.learner.buffer if collect and self.config.draft_refresh else None
            power = 1 << (len(prompts) - 1).bit_length()  # a few prompts more or less are nothing new to measure
            self._slots = max(self._slots, min(self.config.max_slots, power))
            self._choose_source()
        before = len(self.stats.steps)
        completions = self.engine.generate(prompts, params, seed=seed, max_new_tokens=max_new_tokens)
        steps = self.stats.steps[before:]
        drafted = sum(step.rows * step.gamma for step in steps)
        if self.engine.drafter is self.drafter is not None and self.drafter.arbiter is not None:
            self.stats.ngram_drafted += int(self.arbiter.taken)
        self.stats.ngram_drafted += drafted * (self.engine.drafter is self.ngrams.drafter)
        self.stats.model_drafted += drafted * (self.engine.drafter is self.model.drafter)
        if self.learner is not None and collect:
            self.learner.temperature = max(params.temperature, COLDEST) if params else 1.0
            self._trace += steps
            if self.config.draft_ngrams:
                self.history.add((p, c.token_ids) for p, c in zip(prompts, completions, strict=True))
        return completions

    def refresh(self, seconds: float | None = None, *, remaining: int | None = None) -> RefreshStats:
        """Train the head on the rollouts since the last call; nothing happens without a head or with refresh off.

        Every rank of a distributed run calls it equally often.

        Args:
            seconds: how long it may take; by default what `config.draft_overhead` allows, and no longer than it pays.
            remaining: generation phases that the run has still to come, if that is known.
        """
        self.model.policy_changed()
        self.engine.forget()
        if self.learner is None or self._step_began is None:
            return RefreshStats(draft_version=self.draft_version)
        self._last_trace, self._trace = self._trace, []
        if not self.config.draft_refresh:
            return RefreshStats(draft_version=self.draft_version)
        now = time.perf_counter()
        self.learner.budget.earn(now - self._step_began)  # without the training, which would pay for itself
        value = None
        if self.config.num_speculative_tokens is None and seconds is None:
            self._calibrate_head()
            value = RolloutValue(
                self.controller.cost, self._last_trace, self.config.widest, self.sources.otherwise(*self._given)
            )
        head = self.learner.head
        stats = self.learner.refresh(seconds, remaining, value)
        if self.learner.head is not head:
            self._take_head()
        elif stats.steps:
            self._publish()
        self._step_began = time.perf_counter()
        return stats

    def save(self, folder: str | Path) -> None:
        """Write the draft and the controller's tables to `folder` (safetensors and json); nothing without a head."""
        if self.learner is not None:
            self.learner.save(folder, self.head.state_dict())

    def save_with_policy(self, folder: str | Path) -> None:
        """Put the checkpoint's MTP head, if it guesses, beside the policy saved in `folder`, named as it was read."""
        if self.guesses_with_mtp:
            add_to_policy(folder, with_further(self.learner.head, self.learner.mtp, self.engine.target.dtype))

    def load(self, folder: str | Path, resume: bool = True) -> None:
        """Take the head and the tables that `save` wrote, or an EAGLE-3 head from elsewhere; with `resume=False`
        neither the training's budget nor the controller's tables (`DraftLearner.load`)."""
        if self.learner is not None:
            self.head.load_state_dict(self.learner.load(folder, resume))
            self._take_head()

    def _take_head(self) -> None:
        """Decode with the learner's head from now on, of whatever shape it is."""
        target, head = self.engine.target, self.learner.head
        running = copy.deepcopy(head).to(target.device, target.dtype)
        kind = MtpDrafter if isinstance(head, MtpHead) else EagleDrafter
        compiled = self.config.compile_passes, self.config.calibration_cache
        drafter = kind(running, self.learner.view, self.learner.buffer, *compiled)
        self.head.drafter = self.sources.joint.drafter = drafter
        self.ngrams.drafter = NgramDrafter(self.history, drafter.collector)
        self.model.collect_with(drafter.collector)
        self.arbiter = Arbiter(self.history, self.learner.view)
        self._publish()

    def _publish(self) -> None:
        """The head trains in float32 on scaled features; it runs in the policy's dtype on the features as they are."""
        self.drafter.head.load_state_dict(self.learner.head.folded())
        self.drafter.ready = self.learner.trained
        self.arbiter.head_changed()
        self.sources.joint.draft_changed()
        if self.controller is not None:
            self.controller.draft_changed()
            self._stand_watch()

    def _calibrate_head(self) -> None:
        self.head.calibrate(self.engine, self._slots)
        if self.head.watched is self.controller:
            self._stand_watch()

    def _stand_watch(self) -> None:
        self.controller.draft_ready = self.drafter.ready
        expected = self.learner.acceptance[0] if self.learner.acceptance else None
        self.head.watched = Watchman(self.controller, self.drafter.head, expected, self.config.draft_refresh)

    def _choose_source(self) -> None:
        """Let guess who is predicted to take the least time; where none can, the head's drafter still collects."""
        if self.drafter.ready:
            self._calibrate_head()
        alarmed = isinstance(self.head.watched, Watchman) and self.head.watched.alarm
        rates = (self.learner.proven or [PRIOR_RATE]) if self.drafter.ready and not alarmed else None
        name = self.sources.fastest(*self._given, rates)
        source = self.sources.named[name]
        self.engine.drafter, self.engine.controller = source.drafter, source.watched
        self.drafter.arbiter = self.arbiter if source is self.sources.joint else None
        if self.engine.recorder is not None:
            self.engine.recorder.source = name

    @property
    def _given(self) -> tuple[RolloutEngine, int, list[StepStats]]:
        """What tells a source which rollouts to predict."""
        return self.engine, self._slots, self._last_trace or self._trace
