"""TRL's options for asynchronous GRPO with the sampler's beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from trl import ModelConfig
from trl.experimental.async_grpo import AsyncGRPOConfig

from spec_rollout.config import SpecConfig
from spec_rollout.training.option_types import check_types


@dataclass
class AsyncModelConfig(ModelConfig):
    """TRL's options of the policy on a command line; how it is loaded is among those of `AsyncGRPOConfig`
    (findings/trl-async-grpo-config-beside-model-config.sh)."""

    dtype: str | None = field(default=None, init=False)


@dataclass
class SpecAsyncGRPOConfig(SpecConfig, AsyncGRPOConfig):
    r"""
    Configuration class for the [`SpecAsyncGRPOTrainer`].

    Every parameter of TRL's `AsyncGRPOConfig` and of [`SpecConfig`] is a flat key, on the command line and in YAML.
    `vllm_server_base_url` is the address of `spec-rollout serve`.

    Raises:
        ValueError: a value out of its range, or an option that the server would not honour.
    """

    model_class: ClassVar[type[ModelConfig]] = AsyncModelConfig

    rollout_backend: str = field(
        default="vllm", metadata={"help": "Who samples: `vllm`, a server; no other is asynchronous."}
    )

    def __post_init__(self):
        check_types(self)
        AsyncGRPOConfig.__post_init__(self)
        SpecConfig.__post_init__(self)
        judged = self.num_speculative_tokens != 0 and self.verification == "rejection"
        for name, served, remedy in (
            ("rollout_backend", self.rollout_backend == "vllm", "a server draws; set it to 'vllm'"),
            ("calibration_cache", self.calibration_cache is None, "a server's steps are not measured; leave it out"),
            ("temperature", self.temperature > 0, "a group needs completions that differ; give a number above 0"),
            ("min_p", not (self.min_p and judged), "vLLM refuses it beside guesses judged by rejection sampling"),
        ):
            if not served:
                raise ValueError(f"{name}={getattr(self, name)!r} cannot be honoured: {remedy}.")
