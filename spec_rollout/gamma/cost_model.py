"""Seconds of a decode step, from a calibration and from every step since."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from spec_rollout.gamma.correction import TOKENS, Correction
from spec_rollout.gamma.grid import MonotoneGrid, non_decreasing
from spec_rollout.records import StepStats

OFF = 3.0
"""A pass that took so many times what it takes now was timed on another machine, or on a busy one."""


@dataclass(frozen=True)
class Measurement:
    """Seconds of one target pass over `rows` × `tokens` tokens ("verify"), or of guessing `tokens` for `rows` rows
    ("draft"), each row having `context` tokens already.

    Raises:
        ValueError: a value out of its range, naming the value, the bound and the remedy.
    """

    kind: Literal["verify", "draft"]
    rows: int
    tokens: int
    context: int
    seconds: float

    def __post_init__(self):
        bounds = (
            ("kind", self.kind in ("verify", "draft"), '"verify" or "draft"'),
            ("rows", self.rows >= 1, "at least 1"),
            ("tokens", self.tokens >= 1, "at least 1"),
            ("context", self.context >= 0, "0 or more"),
            ("seconds", 0 < self.seconds < math.inf, "finite and above 0; repeat the measurement"),
        )
        for name, holds, bound in bounds:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range: it must be {bound}.")


class CostModel:
    """Predicts seconds per step; `observe` corrects it with steps that really ran.

    A target pass takes base(rows, tokens) + (p * rows + q * rows * tokens) * context seconds: weights and matrix work,
    then reading the keys and values and attending to them. `base` is a monotone grid; p, q ≥ 0 come from cells that
    were measured at more than one context and are 0 without such cells (the correction then follows the context).
    With more rows than measured, a pass costs what the widest measured batch costs at equally many tokens in all.
    Drafting takes draft(rows, tokens) seconds; its one layer's attention is neglected, and it is free if not measured.

    Args:
        measurements: at least one of kind "verify"; repeated cells count with their median.
        host_seconds: what a step costs besides the two passes.
    """

    def __init__(self, measurements: Iterable[Measurement], host_seconds: float = 0.0):
        self._measurements = tuple(measurements)
        self._host_seconds = host_seconds
        verify = [m for m in self._measurements if m.kind == "verify"]
        draft = [m for m in self._measurements if m.kind == "draft"]
        if not verify:
            raise ValueError(
                f"None of the {len(draft)} measurements is of a target pass: measure at least one of kind 'verify'."
            )
        if not 0 <= host_seconds < math.inf:
            raise ValueError(f"host_seconds={host_seconds} is out of range: it must be finite and 0 or more.")
        self._per_row, self._per_token = _context_slopes(verify)
        self._verify = MonotoneGrid(_cells(verify, self._per_row, self._per_token))
        self._draft = MonotoneGrid(_cells(draft)) if draft else None
        self._correction = Correction()
        self._tables: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def verify_seconds(self, rows: int, tokens: Sequence[int] | np.ndarray, context: int = 0) -> np.ndarray:
        """Calibrated seconds [N] of a target pass over `rows` rows with each of `tokens` [N] tokens."""
        tokens = np.asarray(tokens, dtype=float)
        measured = min(rows, self._verify.last_rows)
        base = self._verify.at(measured, tokens * (rows / measured))
        return base + rows * (self._per_row + self._per_token * tokens) * context

    def draft_seconds(self, rows: int, gammas: Sequence[int] | np.ndarray) -> np.ndarray:
        """Calibrated seconds [N] of guessing each of `gammas` [N] tokens for `rows` rows; linear below the grid."""
        gammas = np.asarray(gammas, dtype=float)
        if self._draft is None:
            return np.zeros_like(gammas)
        least = self._draft.first_tokens
        return self._draft.at(rows, np.maximum(gammas, least)) * np.minimum(gammas / least, 1.0)

    def step_seconds(self, rows: int, max_gamma: int, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Corrected seconds of a step with γ = 0 … max_gamma, never falling with γ, and the relative standard error of
        each beside the others; [max_gamma + 1] both."""
        factor, error = self._correction.predict(rows)
        factor, error = _widen(factor, max_gamma), _widen(error, max_gamma)
        seconds = self._calibrated(rows, max_gamma, context) * np.exp(factor)
        if (np.diff(seconds) < 0).any():  # where two are in the wrong order, the one that is known better counts more
            seconds = np.exp(non_decreasing(np.log(seconds), error**-2))
        return seconds, error

    def observe(self, stats: StepStats) -> None:
        """Learn from a step; only the sum of its seconds, as on an asynchronous device the split means nothing."""
        if stats.rows < 1 or stats.gamma < 0 or not 0 < stats.seconds < math.inf:
            return
        calibrated = self._calibrated(stats.rows, stats.gamma, stats.context)[stats.gamma]
        self._correction.observe(stats.rows, stats.gamma + 1, math.log(stats.seconds / calibrated))

    def remeasured(self, other: CostModel) -> CostModel:
        """The measurements of `other`, perhaps with another draft; and what this model has learned from real steps,
        unless its target passes were timed on another machine."""
        model = CostModel(other._measurements, other._host_seconds)
        passes = [m for m in other._measurements if m.kind == "verify"]
        if all(1 / OFF < ratio < OFF for ratio in ratios(self._measurements, passes)):
            model._correction = self._correction
        return model

    @property
    def learned(self) -> bool:
        """Whether steps have corrected it."""
        return self._correction.learned

    def with_draft_of(self, other: CostModel) -> CostModel:
        """The measurements of this model for steps that guess with the draft of `other` too, one after the other."""
        cells = list(self._measurements)
        for i, m in enumerate(cells):
            if m.kind == "draft":
                cells[i] = replace(m, seconds=m.seconds + float(other.draft_seconds(m.rows, [m.tokens])[0]))
        return CostModel(cells, self._host_seconds)

    def to_json(self) -> dict:
        return {
            "measurements": [asdict(m) for m in self._measurements],
            "host_seconds": self._host_seconds,
            "correction": self._correction.to_json(),
        }

    @classmethod
    def from_json(cls, state: dict) -> CostModel:
        """The model that `to_json` saved.

        Raises:
            ValueError: the state is not one that this version saves.
        """
        try:
            model = cls([Measurement(**m) for m in state["measurements"]], state["host_seconds"])
            model._correction = Correction.from_json(state["correction"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"The saved cost model cannot be read ({error!r}): it is of another version; remove it and calibrate "
                "again."
            ) from error
        return model

    def _calibrated(self, rows: int, max_gamma: int, context: int) -> np.ndarray:
        """Uncorrected seconds [max_gamma + 1] per step; linear in the context, so one table per rows serves all."""
        key = rows, max_gamma
        if key not in self._tables:
            gammas = np.arange(max_gamma + 1)
            fixed = self.verify_seconds(rows, gammas + 1) + self.draft_seconds(rows, gammas) + self._host_seconds
            self._tables[key] = fixed, rows * (self._per_row + self._per_token * (gammas + 1))
        fixed, per_context = self._tables[key]
        return fixed + per_context * max(context, 0)


def ratios(before: Iterable[Measurement], now: Iterable[Measurement]) -> list[float]:
    """How many times as long each pass of `now` took `before`, where it was measured then."""
    seconds = {(m.kind, m.rows, m.tokens, m.context): m.seconds for m in before}
    shared = [(seconds.get((m.kind, m.rows, m.tokens, m.context)), m.seconds) for m in now]
    return [then / since for then, since in shared if then]


def _widen(per_tokens: np.ndarray, max_gamma: int) -> np.ndarray:
    """[TOKENS] values for 1, 2 … tokens as [max_gamma + 1] values for γ = 0, 1 …; the last one goes on."""
    if max_gamma < TOKENS:
        return per_tokens[: max_gamma + 1]
    return np.pad(per_tokens, (0, max_gamma + 1 - TOKENS), mode="edge")


def _cells(
    measurements: Sequence[Measurement], per_row: float = 0.0, per_token: float = 0.0
) -> dict[tuple[int, int], float]:
    """Median seconds of each measured (rows, tokens) at context 0, from its shortest context: where attention is not
    linear, it leaves the least to correct. At least a tenth of what was measured."""
    shortest = _shortest(measurements)
    samples: dict[tuple[int, int], list[float]] = {}
    for m in measurements:
        if m.context > shortest[m.rows, m.tokens].context:
            continue
        attention = m.rows * (per_row + per_token * m.tokens) * m.context
        samples.setdefault((m.rows, m.tokens), []).append(max(m.seconds - attention, 0.1 * m.seconds))
    return {cell: float(np.median(seconds)) for cell, seconds in samples.items()}


def _shortest(measurements: Sequence[Measurement]) -> dict[tuple[int, int], Measurement]:
    """Of each (rows, tokens), a measurement at the shortest context."""
    found: dict[tuple[int, int], Measurement] = {}
    for m in sorted(measurements, key=lambda m: m.context):
        found.setdefault((m.rows, m.tokens), m)
    return found


def _context_slopes(measurements: Sequence[Measurement]) -> tuple[float, float]:
    """(p, q) ≥ 0 in seconds = … + (p * rows + q * rows * tokens) * context, by least squares of relative errors.

    Compares each measurement with the one of the same rows and tokens at the shortest context.
    """
    shortest = _shortest(measurements)
    pairs = [(m, shortest[m.rows, m.tokens]) for m in measurements]
    pairs = [(m, base) for m, base in pairs if m.context > base.context]
    if not pairs:
        return 0.0, 0.0
    longer = np.array([m.rows * (m.context - base.context) / m.seconds for m, base in pairs])
    slower = np.array([(m.seconds - base.seconds) / m.seconds for m, base in pairs])
    features = np.column_stack([longer, longer * [m.tokens for m, _ in pairs]])
    if len({m.tokens for m, _ in pairs}) > 1:
        both = np.linalg.lstsq(features, slower, rcond=None)[0]
        if both.min() >= 0:
            return float(both[0]), float(both[1])
    alone = np.maximum(features.T @ slower / (features**2).sum(axis=0), 0.0)
    errors = ((slower[:, None] - features * alone) ** 2).sum(axis=0)
    return (0.0, float(alone[1])) if errors[1] <= errors[0] else (float(alone[0]), 0.0)
