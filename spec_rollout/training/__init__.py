"""What touches TRL: the trainers, their options, and how a run is launched.

Its classes are imported when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spec_rollout.training.async_grpo.config import SpecAsyncGRPOConfig
    from spec_rollout.training.async_grpo.trainer import SpecAsyncGRPOTrainer
    from spec_rollout.training.config import SpecGRPOConfig, SpecRLOOConfig
    from spec_rollout.training.grpo import SpecGRPOTrainer, make_rollout_func
    from spec_rollout.training.ppo.config import PPOConfig
    from spec_rollout.training.ppo.trainer import PPOTrainer
    from spec_rollout.training.rloo import SpecRLOOTrainer

_HOMES = {
    "PPOConfig": "ppo.config",
    "PPOTrainer": "ppo.trainer",
    "SpecAsyncGRPOConfig": "async_grpo.config",
    "SpecAsyncGRPOTrainer": "async_grpo.trainer",
    "SpecGRPOConfig": "config",
    "SpecGRPOTrainer": "grpo",
    "SpecRLOOConfig": "config",
    "SpecRLOOTrainer": "rloo",
    "make_rollout_func": "grpo",
}

__all__ = [
    "PPOConfig",
    "PPOTrainer",
    "SpecAsyncGRPOConfig",
    "SpecAsyncGRPOTrainer",
    "SpecGRPOConfig",
    "SpecGRPOTrainer",
    "SpecRLOOConfig",
    "SpecRLOOTrainer",
    "make_rollout_func",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
