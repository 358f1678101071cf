"""A draft head with everything that its training needs: features, optimiser, vocabulary, budget, version."""

from __future__ import annotations

import copy
import math
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor

from spec_rollout.config import SpecConfig
from spec_rollout.draft import ranks
from spec_rollout.draft.budget import RefreshBudget
from spec_rollout.draft.checkpoint import save_head
from spec_rollout.draft.checkpoint_reader import load_head, load_optimizer
from spec_rollout.draft.draft_model import is_language_model
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.features import FeatureBuffer, measured
from spec_rollout.draft.inheritance import head_config, inherit
from spec_rollout.draft.mtp import MtpHead
from spec_rollout.draft.mtp_checkpoint import is_mtp, load_mtp, save_mtp
from spec_rollout.draft.own_head import checkpoints_own, refuse_other_kind
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.refresh import SETTLED_STEPS, DraftTrainer
from spec_rollout.draft.vocabulary import choose_vocabulary
from spec_rollout.engine.out_of_memory import is_out_of_memory
from spec_rollout.gamma.saving import RolloutValue
from spec_rollout.records import RefreshStats

LEAST_BATCH = 128
"""Tokens of a training step that must find memory."""
YOUNG_STEPS = 100
"""Steps before which a head is judged by what it may become, against all the steps that this still takes: what the
first few of them gain says little about the rest."""


class DraftLearner:
    """Trains a head in float32; what decodes is a copy that the learner's owner makes of `head.folded()`.

    With several ranks all methods but `save` are called on each of them, and all hold the same head.

    Attributes:
        version: trainings so far that changed the head.
        trained: False until the head has learned something or was loaded.
        fitted: whether the features' magnitude has been measured.
        temperature: of the rollouts; acceptance depends on it.
        acceptance: rates of the first, second … guess on unseen rollouts at the last training; empty if not known.
        proven: the same before that training, on the rollouts of prompts that were new to the head.
        healthy: False from a training that failed until the next one that did not.
    """

    def __init__(self, view: PolicyView, config: SpecConfig, device: torch.device, seed: int = 0):
        self.view, self.config, self.device, self.seed = view, config, device, seed
        self.buffer = FeatureBuffer(config.max_feature_tokens, seed=seed)
        self.budget = RefreshBudget(config.draft_overhead)
        self.version = 0
        self.temperature = 1.0
        self.mtp = checkpoints_own(view.model, config)
        self._take(self._new())

    def _new(self) -> EagleHead | MtpHead:
        """The checkpoint's, or one that has learned nothing."""
        if not self.mtp:
            return EagleHead(head_config(self.view.model), self.seed)
        return MtpHead.of(self.view.model, self.mtp, "the policy's folder")

    def _take(self, head: EagleHead | MtpHead) -> None:
        """Start over with `head`."""
        self.trainer = DraftTrainer(head.to(self.device), self.view, self.config.draft_learning_rate, self.seed)
        self.trained = self.fitted = isinstance(head, MtpHead)
        self.healthy = True
        self.acceptance: list[float] = []
        self.proven: list[float] = []
        if self.trained:
            self.trainer.steps = SETTLED_STEPS  # it is not new

    @property
    def head(self) -> EagleHead | MtpHead:
        """The head to decode with."""
        return self.trainer.average

    def refresh(
        self, seconds: float | None = None, remaining: int | None = None, value: RolloutValue | None = None
    ) -> RefreshStats:
        """Train the head on the buffer's rollouts; afterwards they count as an older policy's.

        Args:
            seconds: how long it may take; by default what the budget allows, and no longer than it pays.
            remaining: rollouts that the run has still to come, if known.
            value: what acceptance is worth on rollouts like the last one; None trains for all that the budget allows.
        """
        began = time.perf_counter()
        if not ranks.agree(self.trainer.head.finite and self.head.finite, self.device):
            self._start_over("its weights are not finite")
        self._prepare()

        def worth(before: list[float], after: list[float]) -> float:
            if after and self.trainer.steps < YOUNG_STEPS:
                to_come = (YOUNG_STEPS - self.trainer.steps) * self.trainer.step_seconds
                return self.budget.worth(value.hope(after), remaining) - to_come
            gain = sum(b - a for a, b in zip(before, after, strict=True)) / max(1, len(after))
            return self.budget.worth(gain * value.slope(before), remaining) if after else 0.0

        judge = worth if value is not None and seconds is None else None
        try:
            stats = self.trainer.train(self.buffer, self._allowed(seconds, remaining), judge, self.temperature)
        except FloatingPointError as error:
            self._start_over(str(error))
            self.buffer.clear()  # what made it fail may be among the features
            return RefreshStats(draft_version=self.version)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._take_less(error)
            return RefreshStats(draft_version=self.version)
        self.buffer.advance()
        stats.seconds = time.perf_counter() - began
        if stats.steps and seconds is None:
            brought = judge(stats.acceptance_before, stats.acceptance) if judge else math.inf
            self.budget.spend(stats.seconds, brought)
        if stats.steps:
            self._agree()
            self.version += 1
            self.trained = self.healthy = True
            self.acceptance, self.proven = stats.acceptance, stats.acceptance_before
        stats.draft_version = self.version
        return stats

    def _allowed(self, seconds: float | None, remaining: int | None) -> float:
        return self.budget.seconds(remaining, self.trainer.steps >= SETTLED_STEPS) if seconds is None else seconds

    def _prepare(self) -> None:
        """Vocabulary and scale of the features, the same on every rank."""
        head = self.trainer.head
        if head.own_output is None:
            self.view.draft_ids = choose_vocabulary(self.buffer.samples, self.view)
        if not self.fitted and ranks.agree(bool(self.buffer.samples), self.device):
            features, tokens = measured(self.buffer.samples, self.device)
            head.fit_scale(features, fresh=not self.trained)
            if not self.trained:
                self._inherit(features, tokens)
            ranks.share([*head.state_dict().values(), head.feature_scale])
            self.trainer.average = copy.deepcopy(head).requires_grad_(False)
            self.fitted = True

    def _inherit(self, features: Tensor, tokens: Tensor) -> None:
        missing = inherit(self.trainer.head, self.view, features, tokens)
        if missing:
            what = f"{type(self.view.model).__name__} has no {' and no '.join(missing)} that a draft head could begin"
            told = "its own begins with random weights, and learns for longer before it guesses well."
            warnings.warn(f"{what} with: {told}", RuntimeWarning, stacklevel=4)

    def _agree(self) -> None:
        """After a training every rank must hold the same head; if one does not, all take rank 0's, and no momentum."""
        if ranks.differ(self.head) or ranks.differ(self.trainer.head):
            warnings.warn("The draft heads of the ranks differ: all take rank 0's.", RuntimeWarning, stacklevel=3)
            ranks.share([*self.head.state_dict().values(), *self.trainer.head.state_dict().values()])
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()

    def _take_less(self, error: RuntimeError | MemoryError) -> None:
        """Go on without this training and with smaller batches; other ranks would wait for this one in vain."""
        if ranks.count() > 1 or self.trainer.batch_tokens <= LEAST_BATCH:
            raise error
        self.trainer.batch_tokens //= 2
        self.trainer.head.zero_grad(set_to_none=True)
        self.buffer.clear()
        warnings.warn(
            f"The draft's training ran out of memory and goes on with batches of {self.trainer.batch_tokens} tokens.",
            RuntimeWarning,
            stacklevel=4,
        )

    def _start_over(self, reason: str) -> None:
        warnings.warn(
            f"The draft head is off (num_speculative_tokens=0) and learns again from "
            f"{'those of the checkpoint' if self.mtp else 'new weights'}: {reason}",
            RuntimeWarning,
            stacklevel=4,
        )
        self._take(self._new())
        self.healthy = False

    def save(self, folder: str | Path, controller: dict | None = None) -> None:
        """Write head, optimiser, version, vocabulary, budget and the `controller`'s tables to `folder`.

        The features are not kept: a resumed run collects new ones at its first rollout.
        """
        extra = {
            "draft_version": self.version,
            "trained": self.trained,
            "fitted": self.fitted,
            "acceptance": self.acceptance,
            "budget": self.budget.state_dict(),
            "controller": controller,
        }
        if isinstance(self.head, MtpHead):
            ids = self.view.draft_ids
            extra["draft_ids"] = None if ids is None else ids.tolist()
            save_mtp(folder, self.head, extra, self.trainer.state_dict())
            return
        rows = self.view.output_rows()
        save_head(folder, self.head, rows, self.view.draft_ids, extra, self.trainer.state_dict())

    def load(self, folder: str | Path, resume: bool = True) -> dict | None:
        """Take up what `save` wrote, or a head from elsewhere; returns the controller's tables.

        With `resume=False` neither the budget nor the controller's tables: it comes from another run, perhaps on
        another machine. Weights, optimiser, version and vocabulary are taken up in any case.

        Raises:
            ValueError: nothing there can be read, it was made for another policy, or is not finite and of another run.
        """
        if is_language_model(folder):
            raise ValueError(
                f"{folder} holds a whole language model and no head: give it as draft_model_path, with "
                "rollout_backend='embedded'."
            )
        refuse_other_kind(folder, bool(self.mtp), self.config)
        if is_mtp(folder):
            head, extra = load_mtp(folder, self.view.model)
            draft_ids = None if extra["draft_ids"] is None else torch.tensor(extra["draft_ids"])
        else:
            # one that broke in this run starts over
            head, draft_ids, extra = load_head(folder, HeadConfig.for_target(self.view.config), finite=not resume)
        self._take(head)
        optimizer = load_optimizer(folder)
        if optimizer:
            self.trainer.load_state_dict(optimizer)
        self.view.draft_ids = None if draft_ids is None else draft_ids.to(self.device)
        self.version, self.trained = extra.get("draft_version", 0), extra.get("trained", True)
        self.fitted, self.acceptance = extra.get("fitted", False), extra.get("acceptance", [])
        self.proven = self.acceptance
        if self.trained and not optimizer:
            self.trainer.steps = SETTLED_STEPS  # how many it has been through is not told, but it is not new
        if resume and "budget" in extra:
            self.budget.load_state_dict(extra["budget"])
        return extra.get("controller") if resume else None
