"""The figures of a benchmark, from what each sampler did in each turn."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

from spec_rollout.bench.peers import Measured, Sampler
from spec_rollout.bench.vllm_peers import VLLM, VLLM_EAGLE
from spec_rollout.records import RolloutStats, StepStats

COLD_SHARE = 0.05
"""Of the steps of a rollout, within which γ should have found its place."""


def rows_of(batch_size: int, results: list[tuple[Sampler, list[Measured]]]) -> list[dict]:
    """What `bench --json` keeps of `batch_size` rows: one row per sampler (docs/speed.md names the fields); ratios are
    medians of the ratios within a turn."""
    speeds = {sampler: [m.tokens / m.seconds for m in runs] for sampler, runs in results}
    fixed = [sampler for sampler in speeds if sampler.engine in ("plain", "fixed")]
    best = speeds[max(fixed, key=lambda sampler: statistics.median(speeds[sampler]))]
    base = {sampler.engine: speeds[sampler] for sampler in speeds if sampler.engine in ("transformers", "plain")}
    return [
        {
            "engine": sampler.engine,
            "batch_size": batch_size,
            "gamma": sampler.gamma,
            "verification": sampler.verification,
            "tokens_per_s": statistics.median(speeds[sampler]),
            "tokens_per_s_min": min(speeds[sampler]),
            "tokens_per_s_max": max(speeds[sampler]),
            **_decoding(sampler, runs),
            "peak_memory_gib": max((m.peak_memory_gib for m in runs if m.peak_memory_gib is not None), default=None),
            "speedup_vs_transformers": _ratio(speeds[sampler], base.get("transformers")),
            "speedup_vs_plain": _ratio(speeds[sampler], base["plain"]),
            "regret_vs_best_fixed": 1 - _ratio(speeds[sampler], best),
            "cold_regret": _cold_regret(sampler),
        }
        for sampler, runs in results
    ]


def _cold_regret(sampler: Sampler) -> float | None:
    """Share of goodput that the choices after the first COLD_SHARE of the first rollout lost, by what the controller
    knows in the end: it began with a cost measured on made-up rows and knew nothing of the draft's acceptance."""
    if sampler.controller is None:
        return None
    settled = sampler.first[math.ceil(COLD_SHARE * len(sampler.first)) :]
    return statistics.mean(sampler.controller.regrets(settled)) if settled else None


def _ratio(mine: list[float], theirs: list[float] | None) -> float | None:
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True)) if theirs else None


def _decoding(sampler: Sampler, runs: list[Measured]) -> dict[str, float | None]:
    """What our own engine, or vLLM, says of its steps; None for another's."""
    names = ("mean_acceptance_length", "mean_gamma", "gamma_changes_per_100_steps", "host_time_share")
    if runs[0].stats is None:
        return dict.fromkeys(names)
    stats = [m.stats for m in runs]
    steps = [step for one in stats for step in one.steps]
    seconds = sum(one.seconds - one.prefill_s for one in stats)
    passes = sum(step.draft_s + step.verify_s for step in steps)
    values = (
        RolloutStats(steps).mean_acceptance_length,
        sum(step.gamma for step in steps) / len(steps),
        100 * sum(_changes(one.steps) for one in stats) / len(steps),
        None if sampler.engine in (VLLM, VLLM_EAGLE) else 1 - passes / seconds,  # vLLM times whole steps
    )
    return dict(zip(names, values, strict=True))


def _changes(steps: list[StepStats]) -> int:
    """Steps with another γ than the one before."""
    return sum(a.gamma != b.gamma for a, b in pairwise(steps))
