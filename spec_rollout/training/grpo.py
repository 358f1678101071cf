"""GRPO on speculative rollouts: TRL's trainer with its one sampling method replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from spec_rollout.config import SpecConfig
from spec_rollout.engine.virtual_tokens import virtual_tokens
from spec_rollout.training.config import refuse_conflicts
from spec_rollout.training.endings import judged, judged_turns, plain
from spec_rollout.training.gathering import refuse_partitioned
from spec_rollout.training.mismatch import log_difference
from spec_rollout.training.padding import close_gaps
from spec_rollout.training.prompts import CLIP, REFUSE, fit_prompts
from spec_rollout.training.rollouts import SpeculativeRollouts
from spec_rollout.training.sampler import TrainerSampler
from spec_rollout.training.sampling_params import log_inherited


class SpecGRPOTrainer(SpeculativeRollouts, GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] whose completions come from speculative rollouts: the same distribution, sooner.

    Takes the arguments of [`~trl.GRPOTrainer`]. With a seed in float32, the completions and the learned weights are
    those of plain decoding (`num_speculative_tokens=0`).

    Args:
        args ([`SpecGRPOConfig`] or [`~trl.GRPOConfig`], *optional*):
            Options. With a configuration of TRL's own, the sampler runs on its defaults.

    Raises:
        ValueError: an option that the sampler cannot honour, or a policy that reads more than text.

    Example:

    ```python
    from datasets import load_dataset
    from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer
    from trl.rewards import accuracy_reward

    trainer = SpecGRPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=accuracy_reward,
        args=SpecGRPOConfig(output_dir="out"),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```
    """

    _tag_names: ClassVar[list[str]] = [*GRPOTrainer._tag_names, "spec-rollout"]

    def __init__(
        self, model: str | PreTrainedModel, reward_funcs=None, args: GRPOConfig | None = None, *others, **options
    ):
        super().__init__(model, reward_funcs, args, *others, **options)
        self._corrects = getattr(self.args, "importance_sampling_correction", False)
        if self.sampler.learns_from_trainer:
            self._corrects = self._corrects or self.args.vllm_importance_sampling_correction
        if self._corrects and self.rollout_func is not None:
            raise ValueError(
                "importance_sampling_correction=True needs the log-probs of this package's sampler, but a "
                "rollout_func draws the completions: set it to False, or give no rollout_func."
            )

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        completions = self._sample_turn(prompt_ids, images, multimodal_fields)
        return judged(self, completions), [c.logprobs for c in completions]

    def _tool_call_loop(self, prompts, prompt_ids, completion_ids, *others):
        before, self._turn, self._turns = list(completion_ids), 1, []
        tool_mask, completions, completion_ids, *rest = super()._tool_call_loop(
            prompts, prompt_ids, completion_ids, *others
        )
        self._settle()
        completion_ids = judged_turns(self, prompt_ids, completion_ids, before, self._turns)
        self._turns = []
        return tool_mask, completions, completion_ids, *rest

    def _generate(self, prompts: list):
        with self._use_vllm(False):
            return super()._generate(prompts)

    def _generate_and_score_completions(self, inputs):
        with self._use_vllm(self._corrects):
            output = super()._generate_and_score_completions(inputs)
        if "old_per_token_logps" in output and "sampling_per_token_logps" in output and not self._corrects:
            log_difference(self, output["sampling_per_token_logps"], output["old_per_token_logps"], _mask(output))
        return output

    def _compute_loss(self, model, inputs):
        # Where TRL has not scored the samples beforehand, the loss is computed on the weights that drew them.
        if "old_per_token_logps" not in inputs and "sampling_per_token_logps" in inputs:
            self._to_compare = inputs["sampling_per_token_logps"], _mask(inputs)
        with self._use_vllm(self._corrects):
            return super()._compute_loss(model, inputs)

    @contextmanager
    def _use_vllm(self, value: bool) -> Iterator[None]:
        """After sampling, TRL reads `use_vllm` only to tell whether it shall correct for the sampler's log-probs."""
        before, self.use_vllm = self.use_vllm, value
        try:
            yield
        finally:
            self.use_vllm = before


def _mask(batch: dict) -> Tensor:
    """[B, T]: 1 where the policy drew the token and it counts."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)


def make_rollout_func(
    config: SpecConfig | None = None, overlong_prompts: str = REFUSE
) -> Callable[[list, GRPOTrainer], dict[str, list]]:
    """
    A `rollout_func` for TRL's own [`~trl.GRPOTrainer`], for those who keep it.

    The draft learns and the `speculative/` metrics are logged as in [`SpecGRPOTrainer`]. TRL leaves a rollout function
    out of its checkpoints (`rollout_func.sampler.save_checkpoint(trainer, folder)` and `.load(folder)` do it by hand),
    and samples the later turns of a tool loop itself.

    Args:
        config ([`SpecConfig`], *optional*):
            Options of the sampler.
        overlong_prompts (`str`, *optional*, defaults to `"refuse"`):
            What happens to a prompt that is too long for the policy's context: `"refuse"` or `"clip"`.

    Returns:
        A callable from the trainer's prompts, repeated `num_generations` times, to `prompt_ids`, `completion_ids` and
        `logprobs`.

    Raises:
        ValueError: `config` is of another kind, or `overlong_prompts` unknown; from the callable, an option
            that the sampler cannot honour.

    Example:

    ```python
    trainer = GRPOTrainer(..., rollout_func=make_rollout_func(SpecConfig(max_slots=128)))
    ```
    """
    config = SpecConfig() if config is None else config
    _check(config, overlong_prompts)
    sampler = TrainerSampler(config)

    def rollout_func(prompts: list, trainer: GRPOTrainer) -> dict[str, list]:
        refuse_conflicts(trainer.args)
        refuse_partitioned(trainer)
        if sampler.learns_from_trainer:
            raise ValueError(
                "rollout_backend='vllm' learns from the trainer's passes, which a rollout function does not see: use "
                "SpecGRPOTrainer."
            )
        prompt_ids, images, fields = trainer._tokenize_prompts(prompts)
        prompt_ids = fit_prompts(trainer, prompt_ids, overlong_prompts)
        if not isinstance(trainer, SpeculativeRollouts) and "_calculate_rewards" not in vars(trainer):
            _prepare(trainer)
        with sampler.gathered(trainer):
            completions = sampler.sample(trainer, prompt_ids, images, fields)
            if trainer.model.training:
                sampler.refresh(trainer)
        sampler.log(trainer)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": judged(trainer, completions),
            "logprobs": [c.logprobs for c in completions],
        }

    rollout_func.sampler = sampler
    return rollout_func


def _check(config: SpecConfig, overlong_prompts: str) -> None:
    if not isinstance(config, SpecConfig):
        raise ValueError(f"config is a {type(config).__name__}: give a SpecConfig, or None for its defaults.")
    if overlong_prompts not in (REFUSE, CLIP):
        raise ValueError(
            f"overlong_prompts={overlong_prompts!r} cannot be honoured by a rollout function: give {REFUSE!r} or "
            f"{CLIP!r}, or use SpecGRPOTrainer, which can leave such prompts out of the datasets."
        )


def _prepare(trainer: GRPOTrainer) -> None:
    """Once for a trainer of TRL's own: its reward functions read token ids that have nothing to tell, and its policy
    reads padded rows as it samples them."""
    log_inherited(trainer)
    if virtual_tokens(trainer.model):
        close_gaps(trainer.model)
    rewards = trainer._calculate_rewards
    trainer._calculate_rewards = lambda *given: rewards(*given[:-1], plain(given[-1]))
