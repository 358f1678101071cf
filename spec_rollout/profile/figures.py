"""From recorded rollouts to the figures of a profile: everything in profile.json that is worked out."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spec_rollout.backends.trace import MODEL, NGRAMS, PLACE, RolloutTrace
from spec_rollout.gamma import AcceptanceModel, GammaController
from spec_rollout.records import RolloutStats, StepStats
from spec_rollout.simulate.cost_file import Limits
from spec_rollout.simulate.replay import Costs, Work, position_rates, replay

PROMPT_PARTS = 4
LEAST_PASSES = 20
"""Row passes below which a mean is not shown."""


def by_sampler(traces: Sequence[RolloutTrace]) -> dict[tuple[int, str, int | None], list[RolloutTrace]]:
    """Rollouts by (batch size, sampler, γ), plain first and adaptive last."""
    groups = defaultdict(list)
    for trace in traces:
        groups[trace.labels["batch_size"], trace.labels["sampler"], trace.labels["gamma"]].append(trace)
    order = {"plain": 0, "fixed": 1, NGRAMS: 2, MODEL: 3, "adaptive": 4}
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], order[item[0][1]], item[0][2] or 0)))


class Guesses(NamedTuple):
    """What a replay of rollouts with the guesses of one source needs: costs as its controller knows them, acceptance
    by position, and what the controller knows of it."""

    costs: Costs
    rates: Sequence[float]
    draft: AcceptanceModel

    def predict(self, trace: RolloutTrace, gamma: int | None) -> RolloutStats:
        return replay(Work.of(trace), self.costs, trace.slots, gamma, self.rates, self.draft)


def throughput(traces: Sequence[RolloutTrace], guesses: dict[str, Guesses]) -> list[dict]:
    """Tokens per second of every sampler at every batch size: the median over the turns, and what the controller's
    costs predict for the same completions, by the source of `guesses`. Speed-ups are medians of the ratios within a
    turn."""
    groups, rows = by_sampler(traces), []
    speeds = {key: _speeds(group) for key, group in groups.items()}
    for (size, sampler, gamma), group in groups.items():
        mine, plain = speeds[size, sampler, gamma], speeds.get((size, "plain", 0), {})
        ratios = [speed / plain[turn] for turn, speed in mine.items() if turn in plain]
        stats = RolloutStats([step for trace in group for step in trace.steps])
        known = guesses.get(group[0].source)
        replays = [known.predict(t, gamma) for t in group] if known else []
        rows.append(
            {
                "batch_size": size,
                "sampler": sampler,
                "gamma": gamma,
                "turns": len(mine),
                "tokens_per_s": statistics.median(mine.values()),
                "tokens_per_s_min": min(mine.values()),
                "tokens_per_s_max": max(mine.values()),
                "predicted_tokens_per_s": (
                    sum(r.emitted for r in replays) / sum(r.seconds for r in replays) if replays else None
                ),
                "speedup_vs_plain": statistics.median(ratios) if ratios else None,
                "mean_acceptance_length": stats.mean_acceptance_length,
                "mean_gamma": statistics.mean(step.gamma for step in stats.steps),
            }
        )
    return rows


def _speeds(group: Sequence[RolloutTrace]) -> dict[int, float]:
    """Tokens per second of each turn; not of one that the end of the time cut short, if there are others."""
    turns = defaultdict(list)
    for trace in group:
        turns[trace.labels["turn"]].append(trace)
    whole = max(len(ts) for ts in turns.values())
    return {
        turn: sum(t.tokens for t in ts) / sum(t.seconds for t in ts) for turn, ts in turns.items() if len(ts) == whole
    }


def gamma_map(costs: Costs, draft: AcceptanceModel, widest: int, rows: int, longest: int) -> dict:
    """The controller's γ, and its predicted speed-up, for batch sizes up to `rows` × contexts up to `longest`."""
    controller = GammaController(costs.steps, widest, draft)
    sizes = sorted({2**i for i in range(rows.bit_length())} | {rows})
    contexts = [2**i for i in range(5, max(6, (longest - 1).bit_length() + 1))]
    tokens = draft.expected_curve(widest)
    gamma, speedup = [], []
    for context in contexts:
        ranges = controller.schedule(rows, context)
        chosen = [next(g for first, last, g in ranges if first <= size <= last) for size in sizes]
        seconds = [costs.steps.step_seconds(size, widest, context)[0] for size in sizes]
        gamma.append(chosen)
        speedup.append([float(tokens[g] * s[0] / s[g]) for g, s in zip(chosen, seconds, strict=True)])
    return {"batch_sizes": sizes, "contexts": contexts, "gamma": gamma, "speedup": speedup}


def one_rollout(trace: RolloutTrace, costs: Costs) -> dict:
    """A rollout step by step. `saved_s` adds up, at each step's end, what plain decoding would have taken longer for
    the tokens so far."""
    plain = [s.emitted / s.rows * float(costs.steps.step_seconds(s.rows, 1, s.context)[0][0]) for s in trace.steps]
    saved = np.cumsum([p - s.seconds for p, s in zip(plain, trace.steps, strict=True)])
    return {
        "batch_size": trace.labels["batch_size"],
        "seconds": np.cumsum([s.seconds for s in trace.steps]).tolist(),
        "rows": [s.rows for s in trace.steps],
        "gamma": [s.gamma for s in trace.steps],
        "drafted": [s.rows * s.gamma for s in trace.steps],
        "accepted": [sum(s.accepted) for s in trace.steps],
        "saved_s": saved.tolist(),
    }


def acceptance(traces: Sequence[RolloutTrace], widest: int) -> dict:
    """Acceptance by position; mean acceptance length by place in the answer and by length of the prompt, the latter
    over rollouts in which every pass carried guesses."""
    return {
        "by_position": by_position(traces, widest),
        "by_place": _by_place(traces),
        "by_prompt_tokens": _by_prompt(traces),
    }


def by_position(traces: Sequence[RolloutTrace], widest: int) -> list[dict]:
    """How often the first, second … guess came true, of the rows that reached it."""
    steps = [s for t in traces for s in t.steps if s.gamma]
    reached = [
        sum(s.rows if i == 0 else s.accepted[i - 1] for s in steps if len(s.accepted) > i) for i in range(widest)
    ]
    rates = position_rates(steps, widest) if steps else []
    return [
        {"position": i + 1, "rate": float(rates[i]), "reached": n} for i, n in enumerate(reached) if n >= LEAST_PASSES
    ]


def _by_place(traces: Sequence[RolloutTrace]) -> list[dict]:
    places = max((len(t.place_passes) for t in traces), default=0)
    passes, emitted = np.zeros(places), np.zeros(places)
    for t in traces:
        passes[: len(t.place_passes)] += t.place_passes
        emitted[: len(t.place_emitted)] += t.place_emitted
    return [
        {"first": i * PLACE, "passes": int(n), "mean_acceptance_length": float(emitted[i] / n)}
        for i, n in enumerate(passes)
        if n >= LEAST_PASSES
    ]


def _by_prompt(traces: Sequence[RolloutTrace]) -> list[dict]:
    rows = [
        row
        for t in traces
        if t.labels["sampler"] == "fixed"
        for row in zip(t.prompt_tokens, t.completion_tokens, t.num_steps, strict=True)
        if row[2]  # vLLM does not count them
    ]
    rows.sort()
    parts = [rows[len(rows) * i // PROMPT_PARTS : len(rows) * (i + 1) // PROMPT_PARTS] for i in range(PROMPT_PARTS)]
    return [
        {
            "first": part[0][0],
            "last": part[-1][0],
            "completions": len(part),
            "mean_acceptance_length": sum(tokens for _, tokens, _ in part) / sum(steps for _, _, steps in part),
        }
        for part in parts
        if part
    ]


def time_split(traces: Sequence[RolloutTrace]) -> list[dict]:
    """Where the time of the plain and the adaptive rollouts went, in shares of it, at every batch size."""
    rows = []
    for (size, sampler, _), group in by_sampler(traces).items():
        if sampler not in ("plain", "adaptive"):
            continue
        steps, seconds = [s for t in group for s in t.steps], sum(t.seconds for t in group)
        parts = {
            "prefill": sum(t.prefill_s for t in group),
            "draft": sum(s.draft_s for s in steps),
            "verify": sum(s.verify_s for s in steps),
            "sampling": sum(s.sample_s for s in steps),
            "host": sum(s.host_s - s.sample_s for s in steps),
        }
        shares = {name: part / seconds for name, part in parts.items()}
        idle = 1 - sum(s.rows for s in steps) / sum(t.slots * len(t.steps) for t in group)
        rows.append(
            {"batch_size": size, "sampler": sampler, "seconds": seconds}
            | shares
            | {"other": 1 - sum(shares.values()), "idle_slots": idle}
        )
    return rows


def against_limits(steps: Sequence[StepStats], limits: Limits) -> list[dict]:
    """Median measured and least possible seconds of the policy's passes, by rows and tokens per row."""
    groups: dict[tuple[int, int], list[StepStats]] = defaultdict(list)
    for step in steps:
        groups[1 << (step.rows.bit_length() - 1), step.gamma].append(step)
    found = []
    for (rows, gamma), group in sorted(groups.items()):
        if len(group) < LEAST_PASSES:
            continue
        least = [limits.pass_seconds(limits.parameters, s.rows, s.gamma + 1, s.context) for s in group]
        found.append(
            {
                "rows": rows,
                "gamma": gamma,
                "passes": len(group),
                "verify_s": statistics.median(s.verify_s for s in group),
                "limit_s": statistics.median(least),
                "share": sum(least) / sum(s.verify_s for s in group),
            }
        )
    return found
