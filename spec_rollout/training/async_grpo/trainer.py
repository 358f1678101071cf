"""Asynchronous GRPO: TRL's trainer with our server as its sampler and a draft that learns from its pass."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.experimental.async_grpo import AsyncGRPOTrainer

from spec_rollout.draft.tap import FeatureTap
from spec_rollout.records import RefreshStats
from spec_rollout.training.async_grpo.config import SpecAsyncGRPOConfig
from spec_rollout.training.async_grpo.plain import as_conversations
from spec_rollout.training.async_grpo.transfer import PushTransfer
from spec_rollout.training.async_grpo.tree import rows_of, use_dense_attention
from spec_rollout.training.async_grpo.worker import SpecRolloutWorker
from spec_rollout.training.config import spec_config
from spec_rollout.training.gathering import own_random_stream
from spec_rollout.training.metrics import local_sums, metrics
from spec_rollout.training.whole_weights import WholeWeights

DRAFT_FOLDER = "draft"


class SpecAsyncGRPOTrainer(WholeWeights, AsyncGRPOTrainer):
    """
    TRL's `AsyncGRPOTrainer` on a server that was started by `spec-rollout serve`: completions are drawn while it
    trains, each of their tokens names the versions of policy and draft that drew it, and the draft follows the policy.

    Takes the arguments of TRL's trainer but `rollout_worker`, `weight_transfer` and `peft_config`, in one process.

    Raises:
        ValueError: an argument or option that cannot be honoured.

    Example:

    ```python
    trainer = SpecAsyncGRPOTrainer(
        model="policies/small",
        reward_funcs=accuracy_reward,
        args=SpecAsyncGRPOConfig(output_dir="out", vllm_server_base_url="http://127.0.0.1:8000"),
        train_dataset=dataset,
    )
    trainer.train()
    ```
    """

    _tag_names: ClassVar[list[str]] = [*AsyncGRPOTrainer._tag_names, "spec-rollout"]
    rollout_worker: Any

    def __init__(self, model: str, reward_funcs=None, args: SpecAsyncGRPOConfig | None = None, **options):
        args = SpecAsyncGRPOConfig(f"{model.split('/')[-1]}-AsyncGRPO") if args is None else args
        _refuse(args, options)
        self.transfer = PushTransfer()
        init = AsyncGRPOTrainer.__init__
        init = init if torch.cuda.is_available() else _without_cuda(init)
        init(self, model, reward_funcs, args, weight_transfer=self.transfer, **options)
        self._refuse_unserved()
        if self.accelerator.device.type == "cpu":
            use_dense_attention(self.model)
        config = spec_config(self.args)
        self.transfer.attach(self, config)
        theirs = self.rollout_worker._loop_kwargs
        dataset, tokenizer = as_conversations(theirs["dataset"], theirs["processing_class"])
        if dataset is not theirs["dataset"] and (theirs["tools"] or theirs["environment_factory"]):
            raise ValueError(
                "Prompts of plain text cannot be honoured beside tools or environments, of which the chat template "
                "tells the policy: give conversations, such as [{'role': 'user', 'content': ...}]."
            )
        theirs |= {"dataset": dataset, "processing_class": tokenizer, "seed": args.seed, "coupled": False}
        self.rollout_worker = SpecRolloutWorker(starved=self.transfer.renew, **theirs)
        self.rollout_queue = self.rollout_worker.rollout_buffer
        self._tap: FeatureTap | None = None
        self._pushed_at = time.perf_counter()

    def _refuse_unserved(self) -> None:
        if self.accelerator.num_processes > 1:
            raise ValueError(
                f"{self.accelerator.num_processes} processes: asynchronous GRPO was tested with one; start one, or "
                "use SpecGRPOTrainer with vllm_mode='server'."
            )
        if self._is_vlm:
            raise ValueError("Speculative rollouts sample text-only policies: use TRL's own trainer.")

    def get_train_dataloader(self):
        if self.args.token_budget is None:  # TRL would ask without a key
            self.args.token_budget = self.transfer.server().max_model_len
        return super().get_train_dataloader()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self._listening(inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _listening(self, batch: dict[str, Tensor]) -> AbstractContextManager:
        """Within it the draft hears the policy read the packed row of `batch`."""
        learner = self.transfer.backend.learner
        if learner is None or not self.args.draft_refresh:
            return nullcontext()
        self._tap = self._tap or FeatureTap(self.transfer.backend.model, learner.head.config.aux_layers)
        ids = batch["input_ids"][batch["attention_mask"].bool()]
        return self._tap.listen_packed(learner.buffer, ids, rows_of(batch))

    def _sync_weight(self) -> None:
        backend, first = self.transfer.backend, self.transfer.backend.engine is None
        backend.policy_version += 1
        with own_random_stream(self):
            refreshed = backend.refresh(remaining=self._remaining())
            if not first:
                self.transfer.server().watch()  # before the push: these were the old draft's guesses
            super()._sync_weight()
        self.rollout_worker._loop_kwargs["coupled"] = backend.engine.verification == "coupled"
        seconds, self._pushed_at = time.perf_counter() - self._pushed_at, time.perf_counter()
        if first:
            self.transfer.server().watch()  # nobody has asked before
        else:
            self._log_rollouts(refreshed, seconds)

    def _log_rollouts(self, refreshed: RefreshStats, seconds: float) -> None:
        backend = self.transfer.backend
        backend.stats.steps += backend.engine.take_steps()[0]
        backend.stats.near_ties += backend.engine.near_ties()
        sums = local_sums(backend.take_stats(), refreshed, seconds, backend.draft_version, backend.draft_healthy)
        for name, value in metrics(sums).items():
            self._metrics["train"][name].append(value)

    def _remaining(self) -> int | None:
        """Pushes that the run has still to come; None where it has no fixed length."""
        if self._epoch_stop_groups is not None:
            return None
        return max(0, (self.state.max_steps - self.state.global_step) // self.args.weight_sync_steps)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self.transfer.backend.save(Path(folder, DRAFT_FOLDER))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and Path(checkpoint, DRAFT_FOLDER).is_dir():
            self.transfer.backend.load(Path(checkpoint, DRAFT_FOLDER))


def _without_cuda(init: FunctionType) -> FunctionType:
    """TRL's `init` as it is, but for one name in it: the function that asks CUDA for the device's name, to know its
    speed, and fails where there is none. TRL itself stays as it was."""
    names = {**init.__globals__, "get_peak_flops_per_device": lambda *given: None}
    return FunctionType(init.__code__, names, init.__name__, init.__defaults__, init.__closure__)


def _refuse(args: SpecAsyncGRPOConfig, options: dict) -> None:
    """
    Raises:
        ValueError: an argument that cannot be honoured; those that are refused and None are taken out of `options`.
    """
    if not isinstance(args, SpecAsyncGRPOConfig):
        raise ValueError(f"args is a {type(args).__name__}: give a SpecAsyncGRPOConfig.")
    for name, remedy in (
        ("rollout_worker", "its completions would not tell their versions; leave it out"),
        ("weight_transfer", "the policy is pushed together with a draft; leave it out"),
        ("peft_config", "TRL merges an adapter in place; train all weights, or use SpecGRPOTrainer"),
        ("quantization_config", "its trainer takes none; leave it out"),
        ("eval_dataset", "its trainer does not evaluate; leave it out"),
    ):
        if options.pop(name, None) is not None:
            raise ValueError(f"{name} cannot be honoured by asynchronous GRPO: {remedy}.")
    given = {name: value for name, value in (args.model_init_kwargs or {}).items() if value is not None}
    if given.pop("attn_implementation", None) is not None:
        raise ValueError("attn_implementation cannot be honoured: TRL packs rows for an attention of its own.")
    args.model_init_kwargs = given
