"""A training run's folder as series over its steps: from the trainer's log, its recorded rollouts, or both."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from spec_rollout.backends.trace import FOLDER, RolloutTrace, Trace, joined, read_traces
from spec_rollout.gamma import CostModel
from spec_rollout.records import RolloutStats
from spec_rollout.simulate.replay import Costs, Work, replay
from spec_rollout.simulate.simulate import trained_on

STATE = "trainer_state.json"
PREFIX = "speculative/"
LOGGED = (
    "mean_acceptance_length",
    "acceptance_rate",
    "num_speculative_tokens",
    "goodput",
    "rollout_seconds",
    "rank_wait_seconds",
    "refresh_seconds",
    "draft_loss",
    "draft_acceptance",
)
Series = dict[int, float]
"""Values by training step, counted from 1."""


@dataclass
class Run:
    """One run.

    Attributes:
        series: by name: `reward` and the metrics of LOGGED, and `plain_seconds`, which plain decoding would have
            taken for the rollouts by the run's own measured costs.
    """

    name: str
    series: dict[str, Series] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether nothing was guessed in the whole run."""
        return not any(self.series.get("num_speculative_tokens", {0: 1}).values())

    @property
    def seconds(self) -> Series:
        """Of sampling, draft training charged."""
        trained = self.series.get("refresh_seconds", {})
        return {step: s + trained.get(step, 0.0) for step, s in self.series.get("rollout_seconds", {}).items()}


def read_run(folder: Path) -> Run:
    """What is in the output directory of a training run.

    Raises:
        ValueError: neither a log nor recorded rollouts are there, or one of them cannot be read.
    """
    state, files = _state(folder), sorted(folder.glob(f"{FOLDER}/rank-*.jsonl"))
    if state is None and not files:
        raise ValueError(
            f"{folder} has no {STATE} and no {FOLDER}/: give the output directory of a run that saved checkpoints, "
            "was started by spec-rollout grpo, rloo or ppo, or had profile_rollouts: true."
        )
    run = Run(folder.name or str(folder))
    if files:
        ranks = [read_traces([file]) for file in files]
        run.series |= _recorded(joined(ranks), len(files)) | _waits(ranks)
    if state is not None:
        run.series |= _logged(state)
    if not run.series:
        raise ValueError(f"{folder} holds no step yet: let the run log one (logging_steps).")
    return run


def _state(folder: Path) -> Path | None:
    """The log of the run, or of its newest checkpoint."""
    checkpoints = [p for p in folder.glob(f"checkpoint-*/{STATE}") if p.parent.name.split("-")[1].isdigit()]
    checkpoints.sort(key=lambda p: int(p.parent.name.split("-")[1]))
    found = [p for p in (folder / STATE, *reversed(checkpoints)) if p.exists()]
    return found[0] if found else None


def _logged(path: Path) -> dict[str, Series]:
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        series: dict[str, Series] = defaultdict(dict)
        for entry in history:
            for name in ("reward", *(PREFIX + metric for metric in LOGGED)):
                if name in entry:
                    series[name.removeprefix(PREFIX)][entry["step"]] = float(entry[name])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no trainer's log ({type(error).__name__}: {error}).") from error
    return dict(series)


def _recorded(trace: Trace, ranks: int) -> dict[str, Series]:
    """The same figures from recorded rollouts; seconds are a rank's mean."""
    series: dict[str, Series] = defaultdict(dict)
    steps: dict[int, list[RolloutTrace]] = defaultdict(list)
    for rollout in trained_on(trace.rollouts):
        steps[rollout.labels["step"] + 1].append(rollout)
    costs = {
        source: Costs.fitted(CostModel.from_json(cost), [r for r in trace.rollouts if r.source == source])
        for source, cost in trace.costs.items()
    }
    for step, rollouts in steps.items():
        stats = RolloutStats([s for r in rollouts for s in r.steps], sum(r.seconds for r in rollouts))
        series["mean_acceptance_length"][step] = stats.mean_acceptance_length
        series["num_speculative_tokens"][step] = statistics.mean(s.gamma for s in stats.steps)
        series["goodput"][step] = stats.goodput
        series["rollout_seconds"][step] = stats.seconds / ranks
        if stats.drafted:
            series["acceptance_rate"][step] = stats.acceptance_rate
        if costs:
            series["plain_seconds"][step] = sum(_plain_seconds(r, costs) for r in rollouts) / ranks
    for line in trace.refreshes:
        step = line["labels"]["step"] + 1
        series["refresh_seconds"][step] = series["refresh_seconds"].get(step, 0.0) + line["seconds"] / ranks
        if "loss" in line:
            series["draft_loss"][step] = line["loss"]
    return dict(series)


def _waits(ranks: list[Trace]) -> dict[str, Series]:
    """How long a rank waited in each step for the one that sampled longest, on average; nothing of one rank."""
    seconds: dict[int, list[float]] = defaultdict(lambda: [0.0] * len(ranks))
    for rank, trace in enumerate(ranks):
        for rollout in trained_on(trace.rollouts):
            seconds[rollout.labels["step"] + 1][rank] += rollout.seconds
    waits = {step: max(took) - statistics.mean(took) for step, took in seconds.items()}
    return {"rank_wait_seconds": waits} if len(ranks) > 1 else {}


def _plain_seconds(rollout: RolloutTrace, costs: dict[str, Costs]) -> float:
    """What plain decoding would have taken; what it took, if nothing was guessed."""
    if not any(step.gamma for step in rollout.steps):
        return rollout.seconds
    cost = costs.get(rollout.source, next(iter(costs.values())))  # plain decoding costs the same whoever guesses
    return replay(Work.of(rollout), cost, rollout.slots, 0, []).seconds


def speedup(run: Run, baseline: Run | None) -> Series:
    """Sampling time of `baseline`, or what plain decoding would have taken, over that of `run` with its draft's
    training, by steps that both have."""
    plain = baseline.seconds if baseline is not None else run.series.get("plain_seconds", {})
    return {step: plain[step] / seconds for step, seconds in run.seconds.items() if step in plain and seconds}


def total_speedup(run: Run, baseline: Run | None) -> float | None:
    """The same of the sums over those steps."""
    shared = speedup(run, baseline)
    plain = baseline.seconds if baseline is not None else run.series.get("plain_seconds", {})
    return sum(plain[s] for s in shared) / sum(run.seconds[s] for s in shared) if shared else None
