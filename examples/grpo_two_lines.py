"""GRPO as TRL documents it, sampled speculatively: two lines are not TRL's.

python examples/grpo_two_lines.py
"""

from datasets import load_dataset

from spec_rollout import SpecGRPOConfig as GRPOConfig  # was: from trl import GRPOConfig
from spec_rollout import SpecGRPOTrainer as GRPOTrainer  # was: from trl import GRPOTrainer


def unique_characters(completions, **columns):
    """Rewards variety; takes the place of your own reward."""
    return [float(len(set(text))) for text in completions]


def main():
    trainer = GRPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=unique_characters,
        args=GRPOConfig(output_dir="out"),
        train_dataset=load_dataset("trl-lib/tldr", split="train"),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
