"""RLOO on speculative rollouts: TRL's trainer with its one sampling method replaced."""

from __future__ import annotations

from typing import ClassVar

from trl import RLOOTrainer

from spec_rollout.training.endings import judged
from spec_rollout.training.rollouts import SpeculativeRollouts


class SpecRLOOTrainer(SpeculativeRollouts, RLOOTrainer):
    """
    [`~trl.RLOOTrainer`] whose completions come from speculative rollouts: the same distribution, sooner.

    Takes the arguments of [`~trl.RLOOTrainer`]. With a seed in float32, the completions and the learned weights are
    those of plain decoding (`num_speculative_tokens=0`).

    Args:
        args ([`SpecRLOOConfig`] or [`~trl.RLOOConfig`], *optional*):
            Options. With a configuration of TRL's own, the sampler runs on its defaults.

    Raises:
        ValueError: an option that the sampler cannot honour, or a policy that reads more than text.

    Example:

    ```python
    from datasets import load_dataset
    from spec_rollout.training import SpecRLOOConfig, SpecRLOOTrainer
    from trl.rewards import accuracy_reward

    trainer = SpecRLOOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=accuracy_reward,
        args=SpecRLOOConfig(output_dir="out"),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```
    """

    _tag_names: ClassVar[list[str]] = [*RLOOTrainer._tag_names, "spec-rollout"]

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        completions = self._sample_turn(prompt_ids, images, multimodal_fields)
        # TRL scores them next, on the weights that drew them.
        self._to_compare = [c.logprobs for c in completions], None
        return judged(self, completions)
