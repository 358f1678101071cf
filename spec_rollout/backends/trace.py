"""Rollouts as data: one line of json for each, written as they end. The format is described in docs/profile.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spec_rollout.engine.rows import Rows
from spec_rollout.gamma import CostModel
from spec_rollout.records import Completion, RefreshStats, Request, RolloutStats, StepStats

VERSION = 1
FOLDER = "rollouts"
"""Where a training run keeps its traces, below its output directory."""
HEAD, NGRAMS, BOTH, MODEL = "head", "ngrams", "both", "model"
"""Who guesses: the draft head, what followed the same tokens in earlier rollouts, or a model that does not learn."""
PLACE = 16
"""Width, in completion tokens, of the parts of the answer over which passes are counted."""
STEP_SECONDS = ("draft_s", "verify_s", "sample_s", "host_s")
STEP_COUNTS = ("rows", "gamma", "context", "emitted", "accepted")


@dataclass
class RolloutTrace:
    """One `generate` call.

    Attributes:
        labels: what the call was for, such as the training step.
        slots: rows that could be decoded at the same time.
        seconds, prefill_s: wall time, and the part of it that went to the prompts.
        prompt_tokens, completion_tokens, num_steps, num_drafted, num_accepted: per completion, in order.
        group: per completion, the index of the first one with the same prompt.
        steps: every pass of the decode loop.
        place_passes, place_emitted: row passes with guesses, and what they emitted, by the place in the answer at
            which they began, in parts of PLACE tokens.
        source: who guessed, HEAD, NGRAMS, BOTH of these or MODEL.
    """

    labels: dict[str, Any]
    slots: int
    seconds: float
    prefill_s: float
    prompt_tokens: list[int]
    completion_tokens: list[int]
    group: list[int]
    num_steps: list[int]
    num_drafted: list[int]
    num_accepted: list[int]
    steps: list[StepStats]
    place_passes: list[int] = field(default_factory=list)
    place_emitted: list[int] = field(default_factory=list)
    source: str = HEAD

    @property
    def tokens(self) -> int:
        return sum(self.completion_tokens)

    def to_json(self) -> dict:
        """As written to a file: the steps by column, seconds rounded to 0.1 µs."""
        columns = {name: [getattr(step, name) for step in self.steps] for name in STEP_COUNTS}
        columns |= {name: [round(getattr(step, name), 7) for step in self.steps] for name in STEP_SECONDS}
        return {"version": VERSION, "kind": "rollout", **vars(self), "steps": columns}

    @classmethod
    def from_json(cls, line: dict) -> RolloutTrace:
        columns = line["steps"]
        steps = [
            StepStats(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)
        ]
        older = {"source": HEAD} | line
        return cls(**{name: older[name] for name in cls.__dataclass_fields__ if name != "steps"}, steps=steps)


@dataclass
class Trace:
    """What files hold: rollouts, trainings of the draft, and the calibrated cost of a step by who guesses."""

    rollouts: list[RolloutTrace] = field(default_factory=list)
    refreshes: list[dict] = field(default_factory=list)
    costs: dict[str, dict] = field(default_factory=dict)


class TraceRecorder:
    """Records the rollouts of an engine, in memory or as lines of a file.

    Args:
        path: file to append to; None keeps the rollouts in `rollouts`.
        slots: the engine's `max_slots`.

    Attributes:
        labels, source: of the rollouts to come.
        rollouts: those recorded, without a `path`.
    """

    def __init__(self, slots: int, path: Path | None = None, labels: dict[str, Any] | None = None):
        self.slots, self.path, self.labels = slots, path, labels or {}
        self.source = HEAD
        self.rollouts: list[RolloutTrace] = []
        self._known_costs: set[str] = set()
        self._passes, self._emitted = np.zeros(0), np.zeros(0)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            whole = path.read_bytes()
            with path.open("rb+") as file:  # a line that its writer did not end would spoil the next one
                file.truncate(whole.rfind(b"\n") + 1)

    def step(self, rows: Rows, emitted: np.ndarray, gamma: int) -> None:
        """Count a pass with guesses by the place in the answer where each row stood."""
        if not gamma:
            return
        place = (rows.lengths[: rows.count] - emitted + 1 - rows.starts[: rows.count]) // PLACE
        passes = np.bincount(place, minlength=len(self._passes))
        self._passes = _add(passes, self._passes)
        self._emitted = _add(np.bincount(place, emitted, len(passes)), self._emitted)

    def rollout(self, requests: Sequence[Request], completions: Sequence[Completion], stats: RolloutStats) -> None:
        first: dict[tuple[int, ...], int] = {}
        trace = RolloutTrace(
            labels=dict(self.labels),
            slots=min(self.slots, len(requests)),
            seconds=stats.seconds,
            prefill_s=stats.prefill_s,
            prompt_tokens=[len(r.prompt) for r in requests],
            completion_tokens=[len(c.token_ids) for c in completions],
            group=[first.setdefault(tuple(r.prompt), r.index) for r in requests],
            num_steps=[c.num_steps for c in completions],
            num_drafted=[c.num_drafted for c in completions],
            num_accepted=[c.num_accepted for c in completions],
            steps=stats.steps,
            place_passes=self._passes.astype(int).tolist(),
            place_emitted=self._emitted.astype(int).tolist(),
            source=self.source,
        )
        self._passes, self._emitted = np.zeros(0), np.zeros(0)
        if self.path is None:
            self.rollouts.append(trace)
        else:
            self._write(trace.to_json())

    def refresh(self, stats: RefreshStats) -> None:
        """A training of the draft."""
        figures = {name: value for name, value in asdict(stats).items() if value == value}  # NaN is no json
        self._write({"version": VERSION, "kind": "refresh", "labels": dict(self.labels), **figures})

    def cost(self, cost: CostModel, source: str = HEAD) -> None:
        """What steps cost on this device with the guesses of `source`, once for each."""
        if source not in self._known_costs:
            self._known_costs.add(source)
            self._write({"version": VERSION, "kind": "cost", "source": source, "cost": cost.to_json()})

    def _write(self, line: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")


def read_traces(paths: Iterable[Path]) -> Trace:
    """The rollouts of `paths`. Of lines with the same labels, as an interrupted and resumed run leaves them, the last
    one counts; a last line that was not written to its end counts for nothing.

    Raises:
        ValueError: a line that is no trace of this version; the message names the file and the line.
    """
    trace = Trace()
    rollouts: dict[tuple, RolloutTrace] = {}
    refreshes: dict[tuple, dict] = {}
    for path in paths:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
            if not text.endswith("\n"):
                break  # the writer was ended within the last line
            try:
                line = json.loads(text)
                if line["version"] != VERSION:
                    raise ValueError(f"it is of version {line['version']}, this is version {VERSION}")
                if line["kind"] == "cost":
                    trace.costs[line.get("source", HEAD)] = line["cost"]
                    continue
                key = (path, *sorted(line["labels"].items(), key=str))
                if line["kind"] == "rollout":
                    rollouts[key] = RolloutTrace.from_json(line)
                else:
                    refreshes[key] = line
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}, is no rollout trace ({error}): give a file that `profile_rollouts` or "
                    "`spec-rollout profile` wrote."
                ) from error
    trace.rollouts, trace.refreshes = list(rollouts.values()), list(refreshes.values())
    return trace


def joined(traces: Sequence[Trace]) -> Trace:
    """What several ranks recorded, one after the other; of costs by one guesser, those of the last rank."""
    costs = {source: cost for trace in traces for source, cost in trace.costs.items()}
    return Trace([r for t in traces for r in t.rollouts], [r for t in traces for r in t.refreshes], costs)


def _add(longer: np.ndarray, shorter: np.ndarray) -> np.ndarray:
    total = longer.astype(float)
    total[: len(shorter)] += shorter
    return total
