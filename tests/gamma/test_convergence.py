"""The controller against a simulated machine: within 3 % of the best fixed γ, without flapping, wherever it starts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from spec_rollout.gamma import GammaController
from tests.gamma.simulation import Machine, World

WARM_UP, STEPS, CONTEXT, MAX = 60, 240, 512, 7
SETTLED = 20
"""Last steps in which speculation must be on throughout."""


def decoded(rows: int, rate: float, machine: Machine, steps: int = WARM_UP + STEPS) -> tuple[World, GammaController]:
    """A fresh controller on a noisy calibration after `steps` noisy steps."""
    rng = np.random.default_rng(rows)
    world = World(machine, [rate] * MAX, rng)
    controller = GammaController(machine.calibrate(rng), MAX)
    world.run(controller, rows, CONTEXT, steps)
    return world, controller


def assert_near_best(worlds: dict[int, World], bound: float = 0.03) -> None:
    regrets = {rows: world.regret(rows, CONTEXT, MAX, WARM_UP) for rows, world in worlds.items()}
    worst = max(regrets, key=regrets.get)
    assert regrets[worst] < bound, f"batch size {worst}: {regrets[worst]:.3f} below the best fixed γ"
    switches = [100 * world.switches(WARM_UP) / STEPS for world in worlds.values()]
    assert np.mean(switches) < 4 and max(switches) < 8, "γ flaps"


def test_every_batch_size_is_near_its_best_fixed_gamma():
    worlds = {rows: decoded(rows, 0.75, Machine())[0] for rows in range(1, 129)}
    assert_near_best(worlds)
    best = [world.best(rows, CONTEXT, MAX)[0] for rows, world in worlds.items()]
    assert max(best) >= 5 and min(best) == 0


SKEWS = {
    "twice as slow": lambda rows, tokens: 2.0,
    "wide passes dearer": lambda rows, tokens: 0.75 + 0.08 * tokens,
    "dearer beyond 20 rows": lambda rows, tokens: 1.0 + 0.4 * (rows > 20) * (tokens > 2),
}


@pytest.mark.parametrize("rate", [0.4, 0.7, 0.9])
@pytest.mark.parametrize("skew", SKEWS)
def test_a_calibration_that_is_off_is_corrected(skew, rate):
    machine = Machine(skew=SKEWS[skew])
    assert_near_best({rows: decoded(rows, rate, machine)[0] for rows in (1, 2, 4, 7, 12, 20, 31, 48, 64, 100, 128)})


BUSY = {
    "guesses 10 times": lambda rows, tokens: 10.0 if tokens > 1 else 1.0,
    "guesses at few rows 100 times": lambda rows, tokens: 100.0 if tokens > 1 and rows < 8 else 1.0,
    "all 30 times, guesses 300": lambda rows, tokens: 300.0 if tokens > 1 else 30.0,
    "plain decoding 5 times": lambda rows, tokens: 5.0 if tokens == 1 else 1.0,
}


@pytest.mark.parametrize("rate", [0.5, 0.9])
@pytest.mark.parametrize("busy", BUSY)
def test_a_calibration_on_a_busy_machine_costs_little(busy, rate):
    """From the first step on: what it was wrong by shows within a few steps, and does not come back."""
    machine = Machine(busy=BUSY[busy])
    for rows in (1, 16, 48):
        world, controller = decoded(rows, rate, machine, STEPS)
        assert world.regret(rows, CONTEXT, MAX) < 0.06, f"batch size {rows}"
        world.run(controller, rows, CONTEXT, 2 * STEPS)
        assert world.regret(rows, CONTEXT, MAX, since=STEPS) < 0.05, f"batch size {rows}, later"


@pytest.mark.parametrize(("rows", "rate"), [(40, 0.7), (28, 0.4), (49, 0.9), (12, 0.4), (20, 0.45)])
def test_speculation_that_only_looked_good_is_left(rows, rate):
    """Guessing takes 1.6 times as long as calibrated, plain decoding as long as it should: γ = 0 is best after all."""
    machine = Machine(skew=lambda rows, tokens: 1.6 if tokens > 1 else 1.0)
    world, _ = decoded(rows, rate, machine)
    assert world.best(rows, CONTEXT, MAX)[0] == 0
    assert sum(g == 0 for g in world.gammas[WARM_UP:]) > 0.7 * STEPS


@pytest.mark.parametrize(("rows", "rate"), [(40, 0.9), (70, 0.9), (100, 0.7)])
def test_speculation_that_only_looked_bad_is_found(rows, rate):
    """A first probe finds that guessing costs a third less than calibrated."""
    machine = Machine(skew=lambda rows, tokens: 0.65 if tokens > 1 else 1.0)
    world, _ = decoded(rows, rate, machine)
    assert world.best(rows, CONTEXT, MAX)[0] > 0
    assert sum(g > 0 for g in world.gammas[WARM_UP:]) > 0.8 * STEPS


@pytest.mark.parametrize("rows", [1, 4, 8, 16])
def test_collapse_turns_speculation_off_and_a_better_draft_turns_it_on(rows):
    machine = Machine(draft_s=15e-3)
    world, controller = decoded(rows, 0.85, machine, 200)
    assert all(gamma > 0 for gamma in world.gammas[-SETTLED:])

    world.rates = [0.02] * MAX
    controller.draft_changed()
    world.run(controller, rows, CONTEXT, 300)
    assert sum(gamma > 0 for gamma in world.gammas[-100:]) <= 10

    world.rates = [0.85] * MAX
    controller.draft_changed()
    world.run(controller, rows, CONTEXT, 500)
    assert all(gamma > 0 for gamma in world.gammas[-SETTLED:])
    assert world.regret(rows, CONTEXT, MAX, since=len(world.gammas) - 100) < 0.05


@pytest.mark.parametrize("rows", [4, 16])
def test_changes_of_the_draft_that_nobody_reported_are_found_too(rows):
    machine = Machine(draft_s=15e-3)
    world, controller = decoded(rows, 0.02, machine, 200)
    assert sum(gamma > 0 for gamma in world.gammas[-100:]) <= 10
    world.rates = [0.85] * MAX
    world.run(controller, rows, CONTEXT, 600)
    assert all(gamma > 0 for gamma in world.gammas[-SETTLED:])
    world.rates = [0.02] * MAX
    world.run(controller, rows, CONTEXT, 200)
    assert sum(gamma > 0 for gamma in world.gammas[-50:]) <= 8


@pytest.mark.parametrize("seed", range(3))
def test_gamma_grows_as_a_batch_drains(seed):
    """64 rows whose lengths spread 10:1, against an oracle that knows every cost and rate."""
    rng = np.random.default_rng(seed)
    machine = Machine()
    world, controller = World(machine, [0.8] * MAX, rng), GammaController(machine.calibrate(rng), MAX)
    lengths = np.linspace(30, 300, 64)

    def drain(gamma_for) -> tuple[float, list[int]]:
        done, seconds, chosen = 0.0, 0.0, []
        while rows := int((lengths > done).sum()):
            gamma = gamma_for(rows, 100 + int(done))
            seconds += machine.step(rows, gamma, 100 + int(done))
            done += world.tokens(gamma)
            chosen.append(gamma)
        return seconds, chosen

    def adaptive(rows: int, context: int) -> int:
        gamma = controller.choose(rows, context)
        controller.observe(world.step(rows, gamma, context))
        return gamma

    seconds, chosen = drain(adaptive)
    oracle, _ = drain(lambda rows, context: world.best(rows, context, MAX)[0])
    plain, _ = drain(lambda rows, context: 0)
    assert seconds < 1.05 * oracle < plain
    assert chosen[0] == 0 and chosen[-1] >= 5
    assert sum(later != gamma for gamma, later in itertools.pairwise(chosen)) <= 20
    again, _ = drain(adaptive)
    assert again < 1.03 * oracle
