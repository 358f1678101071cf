"""`spec-rollout bench --contexts`: what a token costs after long prompts, beside `transformers.generate`."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from spec_rollout.bench.memory import peak_memory_gib, reset_peak_memory
from spec_rollout.bench.peers import Measured, Sampler
from spec_rollout.bench.workload import Policy, arithmetic_prompts, table
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import RolloutStats
from spec_rollout.tasks.arithmetic import STYLES

Runs = dict[tuple[Sampler, int], list[Measured]]
"""By sampler and context, one for each turn."""
PROBLEMS = 16
"""Of which a prompt is made, as often as it takes."""


def require_context(policy: Policy, contexts: list[int], new: int) -> None:
    """
    Raises:
        SystemExit: the policy cannot read so far; the message says what to do.
    """
    room, longest = RolloutEngine(policy.model).target.room, max(contexts)
    if room is not None and longest + new > room:
        raise SystemExit(
            f"--contexts {longest} with {new} new tokens (--max-new-tokens) is more than the policy's context of "
            f"{room}: ask for contexts of at most {max(room - new, 0)}, or for fewer new tokens, or give a policy "
            "with a longer context (max_position_embeddings in its config.json)."
        )


def rows_over_contexts(
    policy: Policy, samplers: list[Sampler], batch_size: int, args: argparse.Namespace
) -> list[dict]:
    """What `bench --contexts --json` keeps of `batch_size` rows, docs/speed.md names the fields: one entry per sampler
    and context. All contexts and samplers take part in every turn, and ratios are medians of those within a turn."""
    found = _measure(policy, samplers, batch_size, args)
    costs = {key: [_seconds_per_token(run, batch_size) for run in runs] for key, runs in found.items()}
    base = next((sampler for sampler in samplers if sampler.engine == "transformers"), None)
    rows = []
    for sampler in samplers:
        for context in args.contexts:
            runs, mine = found[sampler, context], [1000 * cost for cost in costs[sampler, context]]
            growth = _growth(costs, sampler, context, args.contexts[0])
            theirs = None if base is None else _growth(costs, base, context, args.contexts[0])
            rows.append(
                {
                    "engine": sampler.engine,
                    "batch_size": batch_size,
                    "context": context,
                    "gamma": sampler.gamma,
                    "verification": sampler.verification,
                    "ms_per_token": statistics.median(mine),
                    "ms_per_token_min": min(mine),
                    "ms_per_token_max": max(mine),
                    "growth": statistics.median(growth),
                    "growth_vs_transformers": theirs and _median_ratio(growth, theirs),
                    "speedup_vs_transformers": base and _median_ratio(costs[base, context], costs[sampler, context]),
                    "prompt_s": statistics.median(run.prompt_s for run in runs),
                    "mean_acceptance_length": _acceptance_length(runs),
                    "peak_memory_gib": max((m.peak_memory_gib for m in runs if m.peak_memory_gib), default=None),
                }
            )
    return rows


def _measure(policy: Policy, samplers: list[Sampler], batch_size: int, args: argparse.Namespace) -> Runs:
    found: Runs = defaultdict(list)
    with tqdm(
        total=(args.repeats + 1) * len(args.contexts) * len(samplers),
        desc=f"bench over contexts, batch size {batch_size}",
        unit="rollout",
        file=sys.stderr,
    ) as bar:
        for turn in range(-1, args.repeats):  # turn -1 warms up
            for context in args.contexts:
                prompts = [prompt_of(policy, context, turn + 1, args.style)] * batch_size
                for sampler in samplers if turn % 2 else reversed(samplers):
                    reset_peak_memory()
                    run = sampler.run(prompts, turn + 1)
                    if turn >= 0:
                        found[sampler, context].append(replace(run, peak_memory_gib=peak_memory_gib()))
                    bar.update()
    return found


def prompt_of(policy: Policy, tokens: int, seed: int, style: str) -> list[int]:
    """Arithmetic problems one after the other, the last `tokens` token ids of them."""
    ids = [i for prompt in arithmetic_prompts(policy.tokenizer, PROBLEMS, seed, STYLES[style]) for i in prompt]
    return (ids * (tokens // len(ids) + 1))[-tokens:]


def _seconds_per_token(run: Measured, rows: int) -> float:
    """Of decoding, prompts not counted. Of our own engine the steps in which all rows took part; of another one what
    came after the first token of each row, which its prompts' pass gives."""
    if run.stats is None:
        return (run.seconds - run.prompt_s) / (run.tokens - rows)
    steps = [step for step in run.stats.steps if step.rows == rows]
    return sum(step.seconds for step in steps) / sum(step.emitted for step in steps)


def _growth(costs: dict, sampler: Sampler, context: int, first: int) -> list[float]:
    """How often the cost at the `first` context goes into that at `context`, by turn."""
    return [long / short for long, short in zip(costs[sampler, context], costs[sampler, first], strict=True)]


def _median_ratio(mine: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def _acceptance_length(runs: list[Measured]) -> float | None:
    if runs[0].stats is None:
        return None
    return RolloutStats([step for run in runs for step in run.stats.steps]).mean_acceptance_length


COLUMNS = {
    "batch_size": "rows",
    "context": "context",
    "ms_per_token": "ms per token",
    "growth": "× first context",
    "growth_vs_transformers": "growth / generate's",
    "speedup_vs_transformers": "× generate",
    "mean_acceptance_length": "acceptance length",
    "prompt_s": "prompt, s",
}


def show(rows: list[dict], json: Path | None) -> None:
    """Print the table; with a file for the figures, draw them beside it."""
    table(["sampler", *COLUMNS.values()], [[_label(row), *(row[key] for key in COLUMNS)] for row in rows])
    if json is not None:
        picture = json.with_suffix(".png")
        draw(rows, picture)
        print(f"Picture: {picture}")


COLOURS = ("#66727d", "#4f7aa3", "#c8385a", "#d9a441", "#6a9f58", "#8a6bb1", "#3f9c9c", "#a0724f")


def draw(rows: list[dict], path: Path) -> None:
    """Milliseconds per token over the context, a line for each sampler and a panel for each batch size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = sorted({row["batch_size"] for row in rows})
    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "legend.frameon": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, len(sizes), figsize=(5.5 * len(sizes), 4), squeeze=False, layout="constrained")
        for axis, size in zip(axes[0], sizes, strict=True):
            lines: dict[str, list[dict]] = defaultdict(list)
            for row in rows:
                if row["batch_size"] == size:
                    lines[_label(row)].append(row)
            for (name, points), colour in zip(lines.items(), COLOURS * len(lines), strict=False):
                places = [row["context"] for row in points]
                axis.plot(
                    places, [row["ms_per_token"] for row in points], "o-", markersize=4, color=colour, label=name
                )
                least, most = ([row[f"ms_per_token_{end}"] for row in points] for end in ("min", "max"))
                axis.fill_between(places, least, most, color=colour, alpha=0.15, linewidth=0)
            axis.set(xscale="log", xlabel="tokens of the prompt", ylim=(0, None))
            axis.set_xticks(places, [f"{place:,}".replace(",", " ") for place in places])
            axis.minorticks_off()
            axis.grid(color="#dde4ea", linewidth=0.8)
            axis.set_ylabel("milliseconds per token")
            axis.set_title(f"{size} row{'s' * (size > 1)}: median, least and most")
            axis.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _label(row: dict) -> str:
    if row["engine"] == "fixed":
        return f"ours, {row['gamma']} guessed"
    name = {"transformers": "transformers.generate", "plain": "ours, plain"}.get(row["engine"], "ours, adaptive")
    return name if row["verification"] != "rejection" else f"{name}, rejection"
