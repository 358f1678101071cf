"""Conditional acceptance rates: counted, forgotten, extrapolated."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_rollout.gamma import AcceptanceModel
from spec_rollout.gamma.acceptance import DECAY, PRIOR_RATE
from spec_rollout.records import StepStats


def observed(model: AcceptanceModel, rates: list[float], rows: int, steps: int, seed: int = 0) -> AcceptanceModel:
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        accepted, left = [], rows
        for rate in rates:
            left = int(rng.binomial(left, rate))
            accepted.append(left)
        model.observe(StepStats(rows, len(rates), 100, rows + sum(accepted), accepted))
    return model


def test_rates_are_conditional_on_having_been_reached():
    rates = [0.9, 0.5, 0.8, 0.3]
    model = observed(AcceptanceModel(), rates, rows=32, steps=100)
    assert model.rates(4) == pytest.approx(rates, abs=0.05)


def test_expected_tokens_sum_the_products_of_the_rates():
    model = observed(AcceptanceModel(), [0.9, 0.5, 0.8], rows=8, steps=30)
    a, b, c = model.rates(3)
    assert model.expected_tokens(0) == 1
    assert model.expected_tokens(3) == pytest.approx(1 + a + a * b + a * b * c)
    assert model.expected_curve(3) == pytest.approx([1, 1 + a, 1 + a + a * b, 1 + a + a * b + a * b * c])


def test_a_new_model_expects_the_prior():
    assert AcceptanceModel().rates(3) == pytest.approx([PRIOR_RATE, PRIOR_RATE * DECAY, PRIOR_RATE * DECAY**2])


def test_positions_never_reached_follow_the_last_one_that_was():
    model = observed(AcceptanceModel(), [0.9, 0.4], rows=32, steps=50)
    rates = model.rates(5)
    assert rates[2:] == pytest.approx([rates[1] * DECAY, rates[1] * DECAY**2, rates[1] * DECAY**3])


def test_positions_not_reached_for_long_follow_again():
    model = observed(AcceptanceModel(), [0.9, 0.1], rows=16, steps=50)
    observed(model, [0.9], rows=16, steps=400)
    assert model.rates(2)[1] == pytest.approx(0.9 * DECAY, abs=0.05)


def test_a_change_is_followed_and_faster_with_more_rows():
    follows = {}
    for rows in (1, 64):
        model = observed(AcceptanceModel(), [0.9], rows, steps=400)
        follows[rows] = observed(model, [0.1], rows, steps=30).rates(1)[0]
    assert follows[64] < 0.2 < follows[1] < 0.9


def test_steps_without_guesses_say_nothing():
    model = observed(AcceptanceModel(), [0.6, 0.6], rows=8, steps=20)
    before = model.to_json()
    model.observe(StepStats(8, 0, 100, 8, []))
    model.observe(StepStats(0, 2, 100, 0, [0, 0]))
    assert model.to_json() == before


def test_reset_keeps_the_rates_at_a_limited_weight():
    model = observed(AcceptanceModel(), [0.9, 0.8], rows=32, steps=100)
    before = model.rates(2)
    model.reset(weight=16)
    assert model.rates(2) == pytest.approx(before, abs=0.1)
    assert observed(model, [0.0], rows=32, steps=2).rates(1)[0] < 0.3


def test_reset_never_adds_weight():
    model = observed(AcceptanceModel(), [0.9], rows=2, steps=3)
    before = model.to_json()
    model.reset(weight=1000)
    assert model.to_json() == before


def test_full_reset_forgets_everything():
    model = observed(AcceptanceModel(), [0.1, 0.1], rows=8, steps=50)
    model.reset()
    assert model.rates(4) == AcceptanceModel().rates(4)


def test_json_round_trip():
    model = observed(AcceptanceModel(), [0.7, 0.6, 0.5], rows=5, steps=20)
    again = AcceptanceModel.from_json(json.loads(json.dumps(model.to_json())))
    assert again.expected_curve(8).tolist() == model.expected_curve(8).tolist()
    assert observed(again, [0.2], 4, 3).rates(5) == observed(model, [0.2], 4, 3).rates(5)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(-1, 300), st.integers(-1, 12), st.lists(st.integers(-3, 400), max_size=14)), max_size=30
    )
)
def test_rates_stay_probabilities_whatever_is_reported(steps):
    model = AcceptanceModel()
    for rows, gamma, accepted in steps:
        model.observe(StepStats(rows, gamma, 10, 0, accepted))
    assert all(0 <= rate <= 1 for rate in model.rates(20))
    curve = model.expected_curve(20)
    assert curve[0] == 1 and np.diff(curve).min() >= 0 and curve[-1] <= 21
