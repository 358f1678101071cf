"""Measured seconds of vLLM's steps on this device."""

from __future__ import annotations

import time

from spec_rollout.backends.calibration import powers_of_two
from spec_rollout.backends.vllm.engine import VLLMEngine
from spec_rollout.config import SpecConfig
from spec_rollout.gamma import FixedGamma
from spec_rollout.gamma.cost_model import CostModel, Measurement
from spec_rollout.records import SamplingParams

PROMPT = 32
STEPS = 6
"""Steps of each batch size and number of guesses, of which the first reads the prompts."""
BUDGET_S = 10.0
"""Past this, measuring ends once a quarter of the slots is covered."""


def measured_cost(engine: VLLMEngine, config: SpecConfig) -> CostModel:
    """Time steps of made-up requests: guessing and verifying together, as vLLM does both in one step."""
    found: list[Measurement] = []
    began = time.perf_counter()
    for rows in powers_of_two(config.max_slots):
        for gamma in sorted({0, 1, 3, config.widest}):
            engine.control(FixedGamma(gamma))
            params = SamplingParams(max_new_tokens=STEPS * (gamma + 1))
            engine.generate([[1 + i % 7 for i in range(PROMPT)]] * rows, params)
            steps, _ = engine.take_steps()
            times = [s.seconds for s in steps if s.rows == rows and s.gamma == gamma and s.seconds]
            found += [Measurement("verify", rows, gamma + 1, PROMPT, seconds) for seconds in times[:STEPS]]
        if time.perf_counter() - began > BUDGET_S and rows >= config.max_slots // 4:
            break
    return CostModel(found)
