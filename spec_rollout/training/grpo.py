"""GRPO on speculative rollouts: TRL's trainer with its one sampling method replaced."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import ClassVar

from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer

from spec_rollout.config import SpecConfig
from spec_rollout.training.config import refuse_conflicts, spec_config
from spec_rollout.training.sampler import TrainerSampler, trainer_params


class SpecGRPOTrainer(GRPOTrainer):
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
        if args is not None:
            refuse_conflicts(args)
        super().__init__(model, reward_funcs, args, *others, **options)
        if self._is_vlm:
            raise ValueError(
                f"{type(self.model).__name__} comes with a processor for more than text, but speculative rollouts "
                "sample text-only policies: pass its tokenizer as processing_class, or use TRL's own trainer."
            )
        self.sampler = TrainerSampler(spec_config(self.args))
        self._turn = 0
        trainer_params(self)

    def _generate(self, prompts: list):
        self._turn = 0
        output = super()._generate(prompts)
        if self.model.training:
            self.sampler.refresh(self)
        self.sampler.log(self)
        return output

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        # TRL's tool loop comes back here; near the end of the context it expects a short completion, not an error.
        later_turn, self._turn = self._turn > 0, self._turn + 1
        completions = self.sampler.sample(self, prompt_ids, images, multimodal_fields, clip=later_turn)
        return [c.token_ids for c in completions], [c.logprobs for c in completions]

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            run_folder = self._get_output_dir(trial=trial)
            self.sampler.save(os.path.join(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.sampler.load(checkpoint)


def make_rollout_func(config: SpecConfig | None = None) -> Callable[[list, GRPOTrainer], dict[str, list]]:
    """
    A `rollout_func` for TRL's own [`~trl.GRPOTrainer`], for those who keep it.

    The draft learns and the metrics are logged as in [`SpecGRPOTrainer`]. TRL leaves a rollout function out of its
    checkpoints (`rollout_func.sampler.save(folder)` and `.load(folder)` do it by hand), and samples the later turns of
    a tool loop itself.

    Args:
        config ([`SpecConfig`], *optional*):
            Options of the sampler.

    Returns:
        A callable from the trainer's prompts, repeated `num_generations` times, to `prompt_ids`, `completion_ids` and
        `logprobs`.

    Example:

    ```python
    trainer = GRPOTrainer(..., rollout_func=make_rollout_func(SpecConfig(max_slots=128)))
    ```
    """
    sampler = TrainerSampler(config or SpecConfig())

    def rollout_func(prompts: list, trainer: GRPOTrainer) -> dict[str, list]:
        refuse_conflicts(trainer.args)
        prompt_ids, images, fields = trainer._tokenize_prompts(prompts)
        completions = sampler.sample(trainer, prompt_ids, images, fields)
        if trainer.model.training:
            sampler.refresh(trainer)
        sampler.log(trainer)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [c.token_ids for c in completions],
            "logprobs": [c.logprobs for c in completions],
        }

    rollout_func.sampler = sampler
    return rollout_func
