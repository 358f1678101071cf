"""How steps that really ran correct the cost model."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_rollout.gamma import CostModel
from spec_rollout.records import StepStats
from tests.gamma.simulation import Machine, exact_model


def step(rows: int, gamma: int, seconds: float, context: int = 512) -> StepStats:
    return StepStats(rows, gamma, context, rows, [0] * gamma, verify_s=seconds)


def calibrated(model: CostModel, rows: int, gamma: int, context: int = 512) -> float:
    host = model.to_json()["host_seconds"]
    return float(model.verify_seconds(rows, [gamma + 1], context)[0] + model.draft_seconds(rows, [gamma])[0]) + host


def run(model: CostModel, rows: int, gamma: int, factor: float, steps: int) -> None:
    for _ in range(steps):
        model.observe(step(rows, gamma, factor * calibrated(model, rows, gamma)))


def corrections(model: CostModel, rows: int, max_gamma: int = 7) -> np.ndarray:
    """[max_gamma + 1] factors that `observe` has put on the calibration."""
    base = [calibrated(model, rows, gamma) for gamma in range(max_gamma + 1)]
    return model.step_seconds(rows, max_gamma, 512)[0] / base


def test_a_factor_common_to_all_reaches_cells_that_never_ran():
    model = exact_model()
    run(model, 8, 0, 2.0, 20)
    for rows in (1, 8, 64, 300):
        assert corrections(model, rows) == pytest.approx(2.0, rel=0.02)


def test_a_cell_that_ran_often_follows_its_own_measurements():
    model = exact_model()
    run(model, 8, 0, 1.0, 30)
    run(model, 8, 3, 1.4, 30)
    factors = corrections(model, 8)
    assert factors[3] == pytest.approx(1.4, rel=0.03)
    assert factors[0] == pytest.approx(1.0, rel=0.05)


def test_neighbours_take_part_of_a_cells_correction():
    model = exact_model()
    run(model, 8, 0, 1.0, 30)
    run(model, 8, 3, 1.4, 30)
    here, wider, far = corrections(model, 8), corrections(model, 12), corrections(model, 2000)
    assert 1.05 < here[4] < 1.4
    assert here[4] > here[7]
    assert wider[3] > 1.1
    assert wider[3] - wider[0] > far[3] - far[0]


def test_a_machine_that_slows_down_moves_all_cells():
    model = exact_model()
    for gamma in (0, 2, 4):
        run(model, 8, gamma, 1.0, 30)
    run(model, 8, 2, 1.5, 80)
    assert corrections(model, 8)[0] > 1.25


@pytest.mark.parametrize("spoiled", [0, 1, 2, 10])
def test_an_interrupted_step_is_shrugged_off(spoiled):
    model = exact_model()
    run(model, 8, 0, 1.0, 20)
    for i in range(12):
        run(model, 8, 3, 10.0 if i == spoiled else 1.0, 1)
    assert corrections(model, 8) == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("factors", [(1, 10, 10, 1), (10, 10, 1, 1)])
def test_two_interruptions_in_a_new_cell_are_overcome(factors):
    model = exact_model()
    run(model, 8, 0, 1.0, 20)
    for factor in factors:
        run(model, 8, 3, factor, 1)
    assert corrections(model, 8)[3] == pytest.approx(1.0, rel=0.1)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 200), st.integers(0, 20), st.floats(1e-6, 1e3)), max_size=40))
def test_corrected_seconds_never_fall_with_gamma(steps):
    model = exact_model()
    for rows, gamma, seconds in steps:
        for _ in range(3):
            model.observe(step(rows, gamma, seconds))
    for rows in (1, 7, 64, 129):
        seconds, error = model.step_seconds(rows, 18, 1000)
        assert seconds.shape == error.shape == (19,)
        assert np.isfinite(seconds).all() and seconds.min() > 0 and error.min() > 0
        assert np.diff(seconds).min() >= -1e-12 * seconds.max()


def test_measuring_a_cell_makes_it_certain():
    model = exact_model()
    before = model.step_seconds(8, 7, 0)[1]
    run(model, 8, 3, 1.0, 10)
    after = model.step_seconds(8, 7, 0)[1]
    assert after[3] < 0.3 * before[3]
    assert (after <= before).all()


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("rows", [0, 4])
def test_steps_without_meaning_teach_nothing(rows, seconds):
    model = exact_model()
    for _ in range(5):
        model.observe(step(rows, 2, seconds if rows else 1.0))
    assert corrections(model, 4) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("machine", "kept"),
    [(Machine(draft_s=90e-3), True), (Machine(draft_s=3e-5), True), (Machine(weights_s=0.6), False)],
)
def test_what_passes_took_counts_with_another_draft_and_not_on_another_machine(machine, kept):
    model = exact_model()
    run(model, 8, 3, 1.5, 20)
    again = model.remeasured(exact_model(machine))
    assert again.learned == kept
    assert corrections(again, 8)[3] == pytest.approx(1.5 if kept else 1.0, rel=0.05)


def test_json_round_trip_keeps_every_prediction():
    model = exact_model()
    rng = np.random.default_rng(1)
    for _ in range(50):
        run(model, int(rng.integers(1, 64)), int(rng.integers(0, 8)), float(rng.uniform(0.5, 2)), 3)
    again = CostModel.from_json(json.loads(json.dumps(model.to_json())))
    for _ in range(3):
        for rows in (1, 9, 50, 128):
            for ours, theirs in zip(again.step_seconds(rows, 9, 700), model.step_seconds(rows, 9, 700), strict=True):
                assert ours.tolist() == theirs.tolist()
        for either in (model, again):
            run(either, 9, 4, 1.7, 1)
