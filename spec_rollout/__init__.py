"""Lossless speculative rollouts for TRL: the same tokens, sooner.

The names below are all that a script needs. What brings torch or TRL with it is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from spec_rollout.config import SpecConfig
from spec_rollout.records import Completion, SamplingParams, UnsupportedModelError

if TYPE_CHECKING:
    from spec_rollout.engine.engine import RolloutEngine
    from spec_rollout.training import (
        PPOConfig,
        PPOTrainer,
        SpecGRPOConfig,
        SpecGRPOTrainer,
        SpecRLOOConfig,
        SpecRLOOTrainer,
        make_rollout_func,
    )

_HOMES = {
    "PPOConfig": "training",
    "PPOTrainer": "training",
    "RolloutEngine": "engine.engine",
    "SpecGRPOConfig": "training",
    "SpecGRPOTrainer": "training",
    "SpecRLOOConfig": "training",
    "SpecRLOOTrainer": "training",
    "make_rollout_func": "training",
}

__all__ = [
    "Completion",
    "PPOConfig",
    "PPOTrainer",
    "RolloutEngine",
    "SamplingParams",
    "SpecConfig",
    "SpecGRPOConfig",
    "SpecGRPOTrainer",
    "SpecRLOOConfig",
    "SpecRLOOTrainer",
    "UnsupportedModelError",
    "make_rollout_func",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found  # asked for once
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
