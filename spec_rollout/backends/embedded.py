"""Rollouts in the trainer's own process: engine, draft head and controller put together."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from spec_rollout.backends.calibration import measured_cost
from spec_rollout.config import SpecConfig
from spec_rollout.draft.checkpoint import load_head, save_head
from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.features import FeatureBuffer
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.refresh import DraftTrainer
from spec_rollout.draft.vocabulary import choose_vocabulary
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.gamma import FixedGamma, GammaController
from spec_rollout.records import Completion, RefreshStats, RolloutStats, SamplingParams

FIT_SAMPLES = 16
"""Rollouts that tell a head the magnitude of the features, before its first training step."""
COLD_SHARE, SHARE = 1.0, 0.08
"""Seconds of draft training per second of rollout: for a head that knows nothing, and in the long run."""


class EmbeddedBackend:
    """Speculative rollouts of `model`, the unwrapped policy, with a draft head that learns from them.

    Args:
        model: a Hugging Face causal language model; the same object in every step, its weights may change.
        config: options.
        tokenizer: needed for stop strings only.
        seed: of the head's initial weights and of its training order; it never reaches the samples.

    Raises:
        UnsupportedModelError: the model cannot be decoded on ragged rows.
        ValueError: the head in `config.draft_model_path` is unreadable or made for another policy.
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
        self.seed = seed
        self.draft_version = 0
        self.draft_healthy = True
        self._controller_state: dict | None = None
        self._slots = 1
        self._allowance = 0.0
        """Seconds that draft training may take: a share of the rollouts' time, less what it has taken."""
        if self.config.num_speculative_tokens != 0:
            self.view = PolicyView(model)
            self.buffer = FeatureBuffer(self.config.max_feature_tokens, seed=seed)
            self._take_head(EagleHead(HeadConfig.for_target(self.view.config), seed))
            if self.config.draft_model_path:
                self.load(self.config.draft_model_path)

    @property
    def drafter(self) -> EagleDrafter | None:
        return self.engine.drafter

    @property
    def controller(self) -> GammaController | FixedGamma | None:
        return self.engine.controller

    @property
    def stats(self) -> RolloutStats:
        """Statistics of the rollouts since `take_stats` was last called."""
        return self.engine.stats

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        *,
        seed: Sequence[int] = (0,),
        max_new_tokens: Sequence[int] | None = None,
        collect: bool = True,
    ) -> list[Completion]:
        """One completion per prompt entry, in order; see `RolloutEngine.generate`.

        `collect=False` keeps these rollouts out of the draft's training, as for evaluation.
        """
        if self.drafter is not None:
            self.drafter.buffer = self.buffer if collect and self.config.draft_refresh else None
            self._slots = max(self._slots, min(self.config.max_slots, len(prompts)))
            self._ready_controller()
        before = self.engine.stats.seconds
        completions = self.engine.generate(prompts, params, seed=seed, max_new_tokens=max_new_tokens)
        if collect:
            self._allowance += (self.engine.stats.seconds - before) * self._share()
        return completions

    def refresh(self, seconds: float | None = None) -> RefreshStats:
        """Train the head on the rollouts since the last call; nothing happens without a head or with refresh off.

        Args:
            seconds: how long it may take; by default a share of the rollouts' time.
        """
        if self.drafter is None or not self.config.draft_refresh or not self.buffer.samples:
            return RefreshStats(draft_version=self.draft_version)
        self.view.draft_ids = choose_vocabulary(self.buffer.samples, self.view.config.vocab_size, self.view.draft_ids)
        if (self.head.feature_scale == 1).all():  # not measured yet
            features = torch.cat([sample.features for sample in self.buffer.samples[:FIT_SAMPLES]])
            self.head.fit_scale(features, fresh=not self.drafter.ready)
        try:
            stats = self.trainer.train(self.buffer, self._allowance if seconds is None else seconds)
        except FloatingPointError as error:
            return self._disable(str(error))
        self.buffer.advance()
        if seconds is None:
            self._allowance -= stats.seconds
        if not stats.steps:
            return RefreshStats(draft_version=self.draft_version)
        self._publish()
        stats.draft_version = self.draft_version
        return stats

    def _share(self) -> float:
        """A head that knows nothing may learn for as long as its rollout took, and half as long with each version."""
        return max(SHARE, COLD_SHARE * 0.5**self.draft_version)

    def take_stats(self) -> RolloutStats:
        """Statistics of the rollouts since the last call."""
        stats, self.engine.stats = self.engine.stats, RolloutStats()
        return stats

    def save(self, folder: str | Path) -> None:
        """Write the head and the controller's tables to `folder` (safetensors and json); nothing without a head."""
        if self.drafter is None:
            return
        extra = {
            "draft_version": self.draft_version,
            "trained": self.drafter.ready,
            "controller": self.controller.state_dict() if self.controller is not None else self._controller_state,
        }
        save_head(folder, self.head, self.view.output_rows(), self.view.draft_ids, extra)

    def load(self, folder: str | Path) -> None:
        """Take the head and the tables that `save` wrote, or an EAGLE-3 head from elsewhere."""
        if self.drafter is None:
            return
        head, draft_ids, extra = load_head(folder, HeadConfig.for_target(self.view.config))
        self.view.draft_ids = None if draft_ids is None else draft_ids.to(self.engine.target.device)
        self._take_head(head)
        self.draft_version = extra.get("draft_version", 0)
        self.drafter.ready = extra.get("trained", True)
        self._controller_state = extra.get("controller")

    def _take_head(self, head: EagleHead) -> None:
        target = self.engine.target
        self.head = head.to(target.device)
        self.trainer = DraftTrainer(self.head, self.view, self.config.draft_learning_rate, self.seed)
        running = EagleHead(head.config).to(target.device, target.dtype)
        self.engine.drafter = EagleDrafter(running, self.view, self.buffer)
        self._sync_running()

    def _sync_running(self) -> None:
        """The head trains in float32 on scaled features; it runs in the policy's dtype on the features as they are."""
        self.drafter.head.load_state_dict(self.head.folded())

    def _publish(self) -> None:
        self._sync_running()
        self.draft_version += 1
        self.drafter.ready = True
        if self.controller is not None:
            self.controller.draft_changed()

    def _ready_controller(self) -> None:
        """Plain decoding until there is a trained head; then measure once, and let the controller choose."""
        fixed = self.config.num_speculative_tokens
        if fixed is not None:
            self.engine.controller = FixedGamma(fixed if self.drafter.ready else 0)
        elif not self.drafter.ready:
            self.engine.controller = FixedGamma(0)
        elif not isinstance(self.controller, GammaController):
            cost = measured_cost(self.engine, self._slots, self.config.widest, self.config.calibration_cache)
            self.engine.controller = GammaController(cost, self.config.widest)
            if "cost" in (self._controller_state or {}):
                self.controller.load_state_dict(self._controller_state)

    def _disable(self, reason: str) -> RefreshStats:
        """A head that cannot be trained is started afresh; until it has learned, decoding is plain."""
        warnings.warn(
            f"The draft head is off (num_speculative_tokens=0) and learns again from new weights: {reason}",
            RuntimeWarning,
            stacklevel=3,
        )
        self.draft_healthy = False
        self._take_head(EagleHead(self.head.config, self.seed))
        return RefreshStats(draft_version=self.draft_version)
