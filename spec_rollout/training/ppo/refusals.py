"""What `PPOTrainer` refuses beside its options: arguments, and ways of running."""

from __future__ import annotations

from transformers import Trainer

from spec_rollout.engine.virtual_tokens import virtual_tokens
from spec_rollout.training.ppo.config import PPOConfig


def refuse_arguments(args: PPOConfig, value_model, reward_funcs) -> None:
    """Refuse arguments of the trainer that cannot be honoured, before a model is loaded."""
    if not isinstance(args, PPOConfig):
        raise ValueError(f"args is a {type(args).__name__}: PPOTrainer needs a PPOConfig.")
    if value_model is not None and args.value_model is not None:
        raise ValueError(
            f"value_model is given twice, to the trainer and as args.value_model={args.value_model!r}: give one."
        )
    rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    if value_model is not None and any(value_model is reward for reward in rewards):
        raise ValueError(
            "value_model is also in reward_funcs: training it as a critic would change the rewards. Load it twice, or "
            "give the critic as a folder."
        )


def refuse_launch(trainer: Trainer, critic: bool) -> None:
    """Refuse a way of running that cannot be honoured."""
    if virtual_tokens(trainer.model):
        raise ValueError(
            "PPOTrainer cannot train virtual tokens (PEFT's prompt and prefix tuning), whose values it would have to "
            "leave out: use an adapter such as LoRA, or GRPO or RLOO."
        )
    if trainer.is_fsdp_enabled:
        raise ValueError("PPOTrainer cannot be run with FSDP: use plain data parallelism or DeepSpeed ZeRO.")
    if critic and trainer._dist.is_zero3:
        raise ValueError(
            "value_model cannot be partitioned by DeepSpeed ZeRO-3: use ZeRO-2, or value_model=None for a value head "
            "on the policy."
        )
    if trainer.optimizer is not None:
        raise ValueError(
            "optimizers holds an optimiser that was made before the value function: leave it out and choose one with "
            "the options optim, learning_rate and value_learning_rate."
        )
