"""What a better draft saves of a rollout, from the cost model and the rollout's own batch sizes."""

import pytest

from spec_rollout.gamma.cost_model import CostModel, Measurement
from spec_rollout.gamma.saving import RolloutValue
from spec_rollout.records import StepStats


def flat(rows=(1, 2, 4, 8)):
    """A machine on which a pass takes a second whatever its shape, and guessing 0.1 s per token."""
    cells = [Measurement("verify", r, t, 10, 1.0) for r in rows for t in (1, 4)]
    return CostModel(cells + [Measurement("draft", r, t, 10, 0.1 * t) for r in rows for t in (1, 4)])


def step(rows, emitted=None):
    return StepStats(rows, 0, 10, rows if emitted is None else emitted, [])


def test_seconds_are_those_of_the_best_gamma():
    value = RolloutValue(flat(), [step(4)] * 6 + [step(2)] * 3, 3)
    assert value.seconds([0.0, 0.0, 0.0]) == pytest.approx(9)
    assert value.seconds([1.0, 1.0, 1.0]) == pytest.approx(9 * 1.3 / 4)
    assert value.seconds([0.5]) == pytest.approx(9 * 1.2 / 1.75)  # two guesses: (1 + .5 + .25) tokens in 1.2 s


def test_what_a_speculative_rollout_drew_counts_as_tokens():
    assert RolloutValue(flat(), [step(4, emitted=12)] * 2, 3).seconds([0.0]) == pytest.approx(6)


def test_a_gain_has_a_value_below_the_rate_at_which_speculation_pays():
    """Where a small step saves nothing yet."""
    dear = CostModel([Measurement("verify", 4, t, 10, 1.0 + 0.5 * (t - 1)) for t in (1, 2, 4)])
    value = RolloutValue(dear, [step(4)] * 10, 3)
    assert value.seconds([0.0]) == value.seconds([0.1])
    assert 0 < value.slope([0.1, 0.1]) < value.slope([0.5, 0.5])


def test_hope_is_what_a_trained_head_would_save():
    value = RolloutValue(flat(), [step(4)] * 10, 3)
    assert value.hope([0.0, 0.0, 0.0]) == pytest.approx(value.seconds([0.0]) - value.seconds([0.7]))
    assert 0 < value.hope([0.9, 0.9, 0.9]) < value.hope([0.5, 0.5, 0.5])


def test_nothing_is_worth_nothing_where_guesses_cannot_pay():
    hopeless = CostModel([Measurement("verify", 4, t, 10, 2.0**t) for t in range(1, 5)])
    assert RolloutValue(hopeless, [step(4)] * 10, 3).slope([0.3, 0.3, 0.3]) == 0


def test_an_empty_rollout_is_worth_nothing():
    assert RolloutValue(flat(), [], 3).slope([0.3]) == 0
