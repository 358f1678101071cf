"""Real rollouts on vLLM: the samplers that `Measuring` compares, on engines of the profile's own process."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from spec_rollout.backends.trace import HEAD
from spec_rollout.backends.vllm.backend import VLLMBackend
from spec_rollout.backends.vllm.colocated import Colocated, engine_options
from spec_rollout.backends.vllm.engine import VLLMEngine
from spec_rollout.backends.vllm.starting import StartEngine
from spec_rollout.bench.workload import Policy
from spec_rollout.config import SpecConfig
from spec_rollout.engine.noise import request_keys
from spec_rollout.profile.measuring import WARM_TOKENS, Measuring, OutOfTime, Sampler, Timed
from spec_rollout.records import Request, RolloutStats

PLAIN = "plain"
"""Source of rollouts on the vLLM that has no draft: its steps say nothing about the other's."""
SHARE = 0.4
"""Of a GPU's memory for each of the two vLLMs."""


class VLLMMeasuring(Measuring):
    """`Measuring` on two vLLMs: one without a draft for plain decoding, since one with a draft runs it even where it
    guesses nothing, and one with the head in the folder `draft`.

    Where vLLM judges guesses by rejection sampling, each sampler draws completions of its own.
    """

    def __init__(self, policy: Policy, draft: Path, slots: int, batch: list[list[int]], recorder: Timed):
        config = SpecConfig(rollout_backend="vllm", max_slots=slots, draft_model_path=str(draft), draft_refresh=False)
        plain = SpecConfig(rollout_backend="vllm", max_slots=slots, num_speculative_tokens=0)
        backends = {
            name: VLLMBackend(policy.model, c, _starter(policy, slots)) for name, c in ((PLAIN, plain), (HEAD, config))
        }
        for backend in backends.values():
            backend.generate(batch, policy.params, max_new_tokens=[WARM_TOKENS] * len(batch))
        self.engines: dict[str, VLLMEngine] = {name: backend.engine for name, backend in backends.items()}
        super().__init__(policy, None, {HEAD: None}, {HEAD: backends[HEAD].controller.cost}, recorder)

    def sample(self, sampler: Sampler, batch: list[list[int]], seed: tuple[int, ...], labels: dict) -> None:
        """One recorded rollout; the time is looked at behind it."""
        self.recorder.labels = sampler.labels | labels
        self.recorder.source = HEAD if sampler.gamma != 0 else PLAIN
        requests = [Request(i, prompt, (0, 0), self.policy.params.max_new_tokens) for i, prompt in enumerate(batch)]
        engine = self._ready(sampler)
        keys = request_keys(seed, len(batch))
        torch.manual_seed(keys[0][0] & 0x7FFFFFFF)
        began = time.perf_counter()
        completions = engine.generate(batch, self.policy.params, keys=keys)
        seconds = time.perf_counter() - began
        self.recorder.rollout(requests, completions, RolloutStats(engine.take_steps()[0], seconds))
        if time.perf_counter() > self.recorder.deadline:
            raise OutOfTime

    def _ready(self, sampler: Sampler) -> VLLMEngine:
        engine = self.engines[PLAIN if sampler.gamma == 0 else HEAD]
        engine.control(self.controller(sampler))
        return engine

    def _warm(self, batch: list[list[int]]) -> None:
        for sampler in (Sampler("plain", 0), Sampler("fixed", 3)):
            engine = self._ready(sampler)
            engine.generate(batch, self.policy.params, [WARM_TOKENS] * len(batch))
            engine.take_steps()


def _starter(policy: Policy, slots: int) -> StartEngine:
    def start(speculative: dict | None) -> VLLMEngine:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its steps are seen from its own process only
        from vllm import LLM

        llm = LLM(
            model=policy.model.name_or_path,
            dtype=str(policy.model.dtype).removeprefix("torch."),
            max_num_seqs=slots,
            gpu_memory_utilization=SHARE,
            skip_tokenizer_init=True,
            **engine_options(speculative),
        )
        return Colocated(llm, policy.model.named_parameters)

    return start
