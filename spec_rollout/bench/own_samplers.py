"""Our engine among the samplers of the benchmark: without guesses, and with fixed and adaptive numbers of them."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

from spec_rollout.bench.peers import Measured, Sampler
from spec_rollout.bench.workload import Policy
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.gamma import CostModel, FixedGamma, GammaController
from spec_rollout.records import Controller, RolloutStats, StepStats


def own_samplers(policy: Policy, engine: RolloutEngine, cost: CostModel, args: argparse.Namespace) -> list[Sampler]:
    """Plain decoding, every fixed γ, and the adaptive one, this with each verification."""
    found = [_sampler(policy, engine, "plain", 0, None)]
    found += [_sampler(policy, engine, "fixed", gamma, FixedGamma(gamma)) for gamma in args.fixed_gammas]
    for verification in args.verification:
        controller = GammaController(CostModel.from_json(cost.to_json()), engine.config.widest)  # each learns alone
        found.append(_sampler(policy, engine, "adaptive", None, controller, verification))
    return found


def _sampler(
    policy: Policy,
    shared: RolloutEngine,
    name: str,
    gamma: int | None,
    controller: Controller | None,
    verification: str = "coupled",
) -> Sampler:
    """With the passes and the drafter of `shared`, compiled once for all, and a cache of its own."""
    drafter = shared.drafter if controller else None
    config = replace(shared.config, verification=verification)
    engine = RolloutEngine(policy.model, config, drafter=drafter, controller=controller)
    engine.target = shared.target
    first: list[StepStats] = []

    def run(prompts: list[list[int]], seed: int) -> Measured:
        engine.stats = RolloutStats()
        began = time.perf_counter()
        completions = engine.generate(prompts, policy.params, seed=(seed,))
        seconds = time.perf_counter() - began
        if not first:
            first.extend(engine.stats.steps)
        return Measured(
            sum(len(c.token_ids) for c in completions), seconds, engine.stats, prompt_s=engine.stats.prefill_s
        )

    adaptive = controller if isinstance(controller, GammaController) else None
    return Sampler(name, gamma, run, verification, adaptive, first)
