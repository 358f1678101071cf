"""A machine and a draft that exist only as formulas, with noise, to run the controller against."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from spec_rollout.gamma import CostModel, Measurement
from spec_rollout.records import StepStats

ROWS, TOKENS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8)


@dataclass
class Machine:
    """Roofline: a pass takes the longer of reading the weights and of the arithmetic, then attention."""

    weights_s: float = 60e-3
    token_s: float = 1.1e-3
    attention_s: float = 2e-8
    draft_s: float = 3e-3
    draft_token_s: float = 2e-5
    host_s: float = 1e-3
    skew: Callable[[int, int], float] = lambda rows, tokens: 1.0
    """Factor on a pass that the calibration did not see."""
    busy: Callable[[int, int], float] = lambda rows, tokens: 1.0
    """Factor on a pass that only the calibration saw, for other jobs that ran."""

    def calibrated_verify(self, rows: int, tokens: int, context: int) -> float:
        work = rows * tokens
        return max(self.weights_s, self.token_s * work) + 0.1 * self.token_s * work + self.attention_s * work * context

    def draft(self, rows: int, gamma: int) -> float:
        return gamma * (self.draft_s + self.draft_token_s * rows)

    def step(self, rows: int, gamma: int, context: int) -> float:
        verify = self.calibrated_verify(rows, gamma + 1, context) * self.skew(rows, gamma + 1)
        return verify + self.draft(rows, gamma) + self.host_s

    def calibrate(self, rng: np.random.Generator, noise: float = 0.05, rows=ROWS, tokens=TOKENS) -> CostModel:
        def measured(kind, r, t, context, seconds):
            return Measurement(kind, r, t, context, float(seconds * np.exp(noise * rng.standard_normal())))

        passes = [(r, t, 128) for r in rows for t in tokens] + [(r, 4, 2048) for r in (1, 8)]
        cells = [measured("verify", *cell, self.calibrated_verify(*cell) * self.busy(*cell[:2])) for cell in passes]
        cells += [measured("draft", r, g, 128, self.draft(r, g)) for r in rows for g in (1, 3, 7)]
        return CostModel(cells, host_seconds=self.host_s)


def exact_model(machine: Machine | None = None) -> CostModel:
    return (machine or Machine()).calibrate(np.random.default_rng(0), noise=0.0)


@dataclass
class World:
    """Steps of `machine` with a draft of conditional `rates`; keeps what the controller did and should have done."""

    machine: Machine
    rates: list[float]
    rng: np.random.Generator
    noise: float = 0.05
    interruptions: float = 0.01
    """Share of steps that take ten times as long."""
    gammas: list[int] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)
    """Expected seconds of each step."""
    gained: list[float] = field(default_factory=list)
    """Expected tokens of each step."""

    def tokens(self, gamma: int) -> float:
        return 1.0 + float(np.cumprod(self.rates[:gamma]).sum())

    def goodput(self, rows: int, gamma: int, context: int) -> float:
        return rows * self.tokens(gamma) / self.machine.step(rows, gamma, context)

    def best(self, rows: int, context: int, max_gamma: int) -> tuple[int, float]:
        curve = [self.goodput(rows, gamma, context) for gamma in range(max_gamma + 1)]
        return int(np.argmax(curve)), max(curve)

    def step(self, rows: int, gamma: int, context: int) -> StepStats:
        accepted, left = [], rows
        for rate in self.rates[:gamma]:
            left = int(self.rng.binomial(left, rate))
            accepted.append(left)
        mean = self.machine.step(rows, gamma, context)
        seconds = mean * float(np.exp(self.noise * self.rng.standard_normal()))
        if self.rng.random() < self.interruptions:
            seconds *= 10
        self.gammas.append(gamma)
        self.spent.append(mean)
        self.gained.append(rows * self.tokens(gamma))
        return StepStats(rows, gamma, context, rows + sum(accepted), accepted, verify_s=seconds)

    def run(self, controller, rows: int, context: int, steps: int) -> None:
        for _ in range(steps):
            controller.observe(self.step(rows, controller.choose(rows, context), context))

    def regret(self, rows: int, context: int, max_gamma: int, since: int = 0) -> float:
        """Share of the best fixed γ's goodput that was missed from step `since` on."""
        reached = sum(self.gained[since:]) / sum(self.spent[since:])
        return 1 - reached / self.best(rows, context, max_gamma)[1]

    def switches(self, since: int = 0) -> int:
        gammas = self.gammas[since:]
        return sum(a != b for a, b in itertools.pairwise(gammas))
