"""vLLM in the trainer's process, with a draft that can be replaced and a number of guesses that can be changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from spec_rollout.backends.vllm.engine import PolicyWeights, completion, sampling_options
from spec_rollout.backends.vllm.keyed_batch import keyed
from spec_rollout.backends.vllm.steady import guesses_steadily, refuse_crowded, refuse_unsteady, room
from spec_rollout.backends.vllm.steps import StepLog
from spec_rollout.backends.vllm.worker import EXTENSION
from spec_rollout.records import Completion, Controller, SamplingParams, StepStats

BLOCK_SIZE = 32
"""Tokens of a block of vLLM's cache; its CPU kernels want a multiple of 32."""


def engine_options(speculative: dict[str, Any] | None) -> dict[str, Any]:
    """What a `vllm.LLM` needs besides the usual options to serve a `Colocated` engine."""
    steady = {"enable_prefix_caching": False} if guesses_steadily(speculative) else {}
    return steady | {
        "speculative_config": speculative,
        "worker_extension_cls": EXTENSION,
        "disable_log_stats": False,
        "block_size": BLOCK_SIZE,
        # so that the log-probs are those of the distribution that was sampled from
        "logprobs_mode": "processed_logprobs",
    }


class Colocated:
    """A `VLLMEngine` around an `LLM` of this process.

    Args:
        llm: made with `engine_options`, and with its engine core in this process.
        policy: the live policy.
        sleeps: whether `sleep` does anything (its `enable_sleep_mode`); what it held must then be pushed again.
        verification: as in `SpecConfig`; after the first push, what is in force.

    Raises:
        ValueError: the policy has recurrent layers, and a step of `llm` no room for the guesses of all rows.
    """

    def __init__(self, llm: Any, policy: PolicyWeights, sleeps: bool = False, verification: str | None = None):
        self.llm, self.policy, self.sleeps, self.verification = llm, policy, sleeps, verification
        self._asleep = False
        config = llm.llm_engine.vllm_config
        speculative = config.speculative_config
        self._room = room(vars(speculative), config.model_config.max_model_len) if speculative else None
        if speculative:
            step = config.scheduler_config
            refuse_crowded(vars(speculative), step.max_num_seqs, step.max_num_batched_tokens)
        self.live_schedule = self._room is None
        self.log = StepLog(speculative.num_speculative_tokens if speculative else 0)
        llm.llm_engine.logger_manager.stat_loggers.append(self.log)
        if speculative and self.live_schedule:
            llm.llm_engine.engine_core.engine_core.scheduler.dynamic_sd_lookup = self.log

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        limits: Sequence[int] | None = None,
        keys: Sequence[tuple[int, int]] | None = None,
    ) -> list[Completion]:
        from vllm import SamplingParams as VLLMSamplingParams

        refuse_unsteady(prompts, limits or [params.max_new_tokens] * len(prompts), self._room)
        coupled = self.verification == "coupled"
        given = [
            VLLMSamplingParams(
                **sampling_options(params, limit, self.log.limit > 0, coupled),
                detokenize=bool(params.stop_strings),
                extra_args=keyed([key] if key else [], params.min_p) if coupled else None,
            )
            for limit, key in zip(limits or [None] * len(prompts), keys or [None] * len(prompts), strict=True)
        ]
        self.log.begin()
        rows = self.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], given, use_tqdm=False)
        outputs = [row.outputs[0] for row in rows]
        return [completion(o.token_ids, _logprobs(o), o.finish_reason, params.eos_token_ids) for o in outputs]

    def load(self, draft: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        self._wake()
        self._call("live_load", self.policy(), draft, version)
        self.verification = self._call("live_verify", self.verification)
        self.llm.reset_prefix_cache()

    def versions(self) -> list[int]:
        """Nothing survives sleep."""
        return [0, 0] if self._asleep else self._call("live_versions")

    def draft_probe(self) -> list[dict[str, float]]:
        return [self._call("live_probe")]

    def near_ties(self) -> int:
        return self._call("live_near_ties")

    def control(self, controller: Controller) -> None:
        self.log.controller = controller

    def take_steps(self) -> tuple[list[StepStats], float]:
        return self.log.take()

    def sleep(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=2)
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self.llm.wake_up()
            self._asleep = False

    def _call(self, method: str, *arguments: Any) -> Any:
        """One of the methods of `LiveWeights`."""
        return self.llm.collective_rpc(method, args=arguments)[0]


def _logprobs(output: Any) -> list[float]:
    """Of the drawn tokens."""
    return [float(at[token].logprob) for token, at in zip(output.token_ids, output.logprobs, strict=True)]
