"""A vLLM that decodes what it is told to over its standard input, in a process and an interpreter of its own.

It holds one policy, with one head or none, and answers each line of JSON with one. `vllm_peers` talks to it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any

import torch

from spec_rollout.backends.vllm.calibration import measured_cost
from spec_rollout.backends.vllm.colocated import Colocated, engine_options
from spec_rollout.backends.vllm.engine import sampling_options, speculative_config
from spec_rollout.bench.memory import peak_memory_gib, reset_peak_memory
from spec_rollout.config import SpecConfig
from spec_rollout.gamma import CostModel, FixedGamma, GammaController
from spec_rollout.records import Controller, SamplingParams

PROMPT_TOKENS = 4096
"""Most tokens of one pass, as in the trainers."""


class Contender:
    """vLLM with the `setup` that `vllm_peers` sends first."""

    def __init__(self, setup: dict[str, Any]):
        from vllm import LLM

        slots, draft, self.most = setup["slots"], setup["draft"], setup["most"]
        self.params = SamplingParams(**setup["params"])
        llm = LLM(
            model=setup["policy"],
            dtype=setup["dtype"],
            max_num_seqs=slots,
            max_num_batched_tokens=PROMPT_TOKENS,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,  # or a second run on the same prompts would not read them
            **engine_options(speculative_config(draft, self.most, slots) if draft else None),
        )
        self.engine = Colocated(llm, dict)
        self.cost: CostModel | None = None
        self.controllers: dict[int, GammaController] = {}
        if draft:
            llm.collective_rpc("live_load", args=(None, None, 0))  # loads nothing; makes samples lossless on a CPU
            self.cost = measured_cost(self.engine, SpecConfig(max_slots=slots, max_num_speculative_tokens=self.most))

    def run(self, prompts: list[list[int]], gamma: int | None, seed: int) -> dict[str, Any]:
        """One completion per prompt with `gamma` guesses per step (None: the controller's), timed in here."""
        from vllm import SamplingParams as VLLMSamplingParams

        # without log-probs, which cost vLLM time
        options = sampling_options(self.params, None, self.cost is not None) | {"logprobs": None, "detokenize": False}
        if self.cost is not None:
            self.engine.control(self._controller(len(prompts), gamma))
        torch.manual_seed(seed)
        reset_peak_memory()
        self.engine.log.begin()
        began = time.perf_counter()
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        rows = self.engine.llm.generate(inputs, VLLMSamplingParams(**options), use_tqdm=False)
        seconds = time.perf_counter() - began
        steps, prefill_s = self.engine.take_steps()
        return {
            "tokens": sum(len(row.outputs[0].token_ids) for row in rows),
            "seconds": seconds,
            "prefill_s": prefill_s,
            "peak_memory_gib": peak_memory_gib(),
            "steps": [asdict(step) for step in steps],
        }

    def _controller(self, batch_size: int, gamma: int | None) -> Controller:
        """Each batch size has a controller of its own, as our own engine has in the benchmark."""
        if gamma is not None:
            return FixedGamma(gamma)
        if batch_size not in self.controllers:
            self.controllers[batch_size] = GammaController(CostModel.from_json(self.cost.to_json()), self.most)
        return self.controllers[batch_size]


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints is no reply
    contender = None
    for line in sys.stdin:
        message = json.loads(line)
        if contender is None:
            contender, reply = Contender(message), {}
        else:
            reply = contender.run(**message)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
