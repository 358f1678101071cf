"""What a trainer logs about its rollouts: sums over steps and ranks first, ratios of the sums afterwards."""

from __future__ import annotations

from spec_rollout.config import SpecConfig
from spec_rollout.engine.room import GIB
from spec_rollout.records import RefreshStats, RolloutStats

PREFIX = "speculative/"
POSITIONS = SpecConfig().max_num_speculative_tokens
"""Guesses of a step that are told apart, the same on every rank."""
SECONDS_OF = "seconds_of_"


def local_sums(
    stats: RolloutStats,
    refresh: RefreshStats,
    seconds: float,
    version: int,
    healthy: bool,
    rank: int = 0,
    ranks: int = 1,
) -> dict[str, float]:
    """The share of `rank` in everything that `metrics` divides; the same keys in the same order on each of `ranks`.

    `seconds` is what the rollouts took as the trainer saw it, with everything around the decode loop.
    """
    speculative = [step for step in stats.steps if step.gamma]
    return {
        "ranks": 1,
        "steps": len(stats.steps),
        "gammas": sum(step.gamma for step in stats.steps),
        "emitted": stats.emitted,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "ngram_drafted": stats.ngram_drafted,
        "model_drafted": stats.model_drafted,
        "lean_steps": stats.lean_steps,
        "compiled_steps": stats.compiled_steps,
        "preemptions": stats.preemptions,
        "cache_bytes": stats.cache_bytes,
        "prefilled_tokens": stats.prefilled_tokens,
        "reused_tokens": stats.reused_tokens,
        "speculative_rows": sum(step.rows for step in speculative),
        "speculative_emitted": sum(step.emitted for step in speculative),
        "seconds": seconds,
        "prefill_s": stats.prefill_s,
        "draft_s": sum(step.draft_s for step in stats.steps),
        "verify_s": sum(step.verify_s for step in stats.steps),
        "host_s": sum(step.host_s for step in stats.steps),
        "refresh_s": refresh.seconds,
        "refresh_tokens": refresh.tokens,
        "refresh_loss": refresh.loss * refresh.tokens if refresh.tokens else 0.0,
        "draft_acceptance": refresh.acceptance[0] if refresh.acceptance else 0.0,
        "draft_version": version,
        "draft_healthy": float(healthy),
        **{f"{SECONDS_OF}{i}": seconds * (i == rank) for i in range(ranks)},  # a sum that keeps them apart
        **{f"drafted_{i}": sum(step.rows for step in speculative if step.gamma >= i) for i in _positions()},
        **{f"accepted_{i}": sum(sum(step.accepted[i - 1 : i]) for step in speculative) for i in _positions()},
    }


def _positions() -> range:
    return range(1, POSITIONS + 1)


def metrics(sums: dict[str, float]) -> dict[str, float]:
    """The figures to log, from sums over all ranks. A ratio over nothing (no guess, no training) is left out.

    Seconds are a rank's mean, and goodput is the tokens per second of one rank.
    """
    ranks = sums["ranks"]
    figures = {
        "num_speculative_tokens": sums["gammas"] / max(1, sums["steps"]),
        "mean_acceptance_length": (
            sums["speculative_emitted"] / sums["speculative_rows"] if sums["speculative_rows"] else 1.0
        ),
        "goodput": sums["emitted"] / sums["seconds"] if sums["seconds"] else 0.0,
        "rollout_seconds": sums["seconds"] / ranks,
        "refresh_seconds": sums["refresh_s"] / ranks,
        "draft_version": sums["draft_version"] / ranks,
        "draft_healthy": sums["draft_healthy"] / ranks,
        "lean_share": sums["lean_steps"] / max(1, sums["steps"]),
        "compiled_share": sums["compiled_steps"] / max(1, sums["steps"]),
        "preemptions": sums["preemptions"],
        "cache_gib": sums["cache_bytes"] / ranks / GIB,
        "prefilled_tokens": sums["prefilled_tokens"],
        "reused_tokens": sums["reused_tokens"],
    }
    if ranks > 1:
        slowest = max(value for name, value in sums.items() if name.startswith(SECONDS_OF))
        figures["rank_wait_seconds"] = max(0.0, slowest - sums["seconds"] / ranks)
    figures |= {f"time_{part}": sums[f"{part}_s"] / ranks for part in ("prefill", "draft", "verify", "host")}
    if sums["drafted"]:
        figures["acceptance_rate"] = sums["accepted"] / sums["drafted"]
        figures["ngram_share"] = sums["ngram_drafted"] / sums["drafted"]
        figures["model_share"] = sums["model_drafted"] / sums["drafted"]
        guessed = [i for i in _positions() if sums[f"drafted_{i}"]]
        figures |= {f"acceptance_rate_{i}": sums[f"accepted_{i}"] / sums[f"drafted_{i}"] for i in guessed}
    if sums["refresh_tokens"]:
        figures["draft_loss"] = sums["refresh_loss"] / sums["refresh_tokens"]
        figures["draft_acceptance"] = sums["draft_acceptance"] / ranks
    return {PREFIX + name: value for name, value in figures.items()}
