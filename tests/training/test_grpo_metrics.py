"""What is logged: ratios of sums, over steps and over ranks."""

from __future__ import annotations

import pytest

from spec_rollout.records import RefreshStats, RolloutStats, StepStats
from spec_rollout.training.metrics import local_sums, metrics


def rank(
    *steps: StepStats, seconds: float, refresh: RefreshStats | None = None, number: int = 0, ranks: int = 1
) -> dict[str, float]:
    stats = RolloutStats(steps=list(steps), seconds=99.0, prefill_s=0.5, ngram_drafted=2, lean_steps=1)
    stats.preemptions, stats.cache_bytes = 1, 3 << 29
    stats.prefilled_tokens, stats.reused_tokens = 20, 30
    return local_sums(stats, refresh or RefreshStats(), seconds, version=3, healthy=True, rank=number, ranks=ranks)


def total(*ranks: dict[str, float]) -> dict[str, float]:
    return {name: sum(r[name] for r in ranks) for name in ranks[0]}


def step(rows: int, gamma: int, emitted: int, accepted: list[int]) -> StepStats:
    return StepStats(rows, gamma, 10, emitted, accepted, draft_s=1.0, verify_s=2.0, host_s=3.0)


def test_ratios_are_taken_of_sums():
    trained = [RefreshStats(2, 10, 0.4, 1.5, 3, [0.6, 0.5]), RefreshStats(2, 30, 0.8, 0.5, 3, [0.6, 0.5])]
    first = rank(step(4, 3, 10, [3, 2, 1]), step(4, 0, 4, []), seconds=2.0, refresh=trained[0], ranks=2)
    second = rank(step(1, 1, 1, [0]), seconds=4.0, refresh=trained[1], number=1, ranks=2)
    assert metrics(total(first, second)) == pytest.approx(
        {
            "speculative/acceptance_rate": 6 / 13,
            "speculative/acceptance_rate_1": 3 / 5,  # of the rows that guessed so far
            "speculative/acceptance_rate_2": 2 / 4,
            "speculative/acceptance_rate_3": 1 / 4,
            "speculative/ngram_share": 4 / 13,
            "speculative/model_share": 0,
            "speculative/mean_acceptance_length": 11 / 5,
            "speculative/num_speculative_tokens": 4 / 3,
            "speculative/goodput": 15 / 6,
            "speculative/draft_loss": (10 * 0.4 + 30 * 0.8) / 40,
            "speculative/draft_acceptance": 0.6,
            "speculative/draft_version": 3,
            "speculative/draft_healthy": 1,
            "speculative/lean_share": 2 / 3,
            "speculative/compiled_share": 0,
            "speculative/preemptions": 2,
            "speculative/cache_gib": 1.5,
            "speculative/prefilled_tokens": 40,
            "speculative/reused_tokens": 60,
            "speculative/rollout_seconds": 3,
            "speculative/rank_wait_seconds": 1,  # 4 s of the slowest less 3, a rank's mean
            "speculative/refresh_seconds": 1,
            "speculative/time_prefill": 0.5,
            "speculative/time_draft": 1.5,
            "speculative/time_verify": 3,
            "speculative/time_host": 4.5,
        }
    )


def test_a_ratio_over_nothing_is_left_out():
    figures = metrics(rank(step(2, 0, 2, []), seconds=1.0))
    assert "speculative/acceptance_rate" not in figures and "speculative/draft_loss" not in figures
    assert figures["speculative/mean_acceptance_length"] == 1.0
    assert figures["speculative/num_speculative_tokens"] == 0.0
    assert "speculative/rank_wait_seconds" not in figures  # one process waits for none
