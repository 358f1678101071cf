"""Lossless speculative rollouts for TRL: the same tokens, sooner."""

from spec_rollout.config import SpecConfig
from spec_rollout.records import Completion, SamplingParams, UnsupportedModelError

__all__ = ["Completion", "SamplingParams", "SpecConfig", "UnsupportedModelError"]
