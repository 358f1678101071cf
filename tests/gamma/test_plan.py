"""What confidence learns, and what plans make of it."""

import json

import numpy as np
import pytest

from spec_rollout.gamma import CostModel, GammaController, Measurement
from spec_rollout.gamma.confidence import DEPTHS, MOST, Confidence
from spec_rollout.gamma.plan import Plan, Prices
from spec_rollout.records import StepStats


def prices(rows: int, depth: int, guess: float, draft: float = 0.0) -> Prices:
    """Each guess costs the worth of `guess` tokens to verify, each round of drafting that of `draft`."""
    return Prices(1 + np.arange(rows * depth + 1) * guess, np.arange(depth + 1) * draft, 1.0)


def plan(rows, depth, guess, draft=0.0, ragged=True, confidence=None, rate=0.8):
    return Plan(confidence or Confidence(), [rate] * depth, prices(rows, depth, guess, draft), rows, ragged)


def learned(chance, steps: int = 60, rows: int = 64) -> Confidence:
    """Of a draft whose guesses come true by `chance` of (place, probability)."""
    noise, confidence = np.random.default_rng(0), Confidence()
    for _ in range(steps):
        said = noise.random((rows, 3))
        true = noise.random((rows, 3)) < chance(np.arange(3), said)
        judged = np.cumprod(np.concatenate([np.ones((rows, 1), bool), true[:, :-1]], 1), 1).astype(bool)
        confidence.observe(said, judged, true & judged)
    return confidence


@pytest.mark.parametrize("chance", [lambda i, p: p, lambda i, p: p**2, lambda i, p: p * 0.6**i, lambda i, p: 1 - p])
def test_it_is_calibrated_within_three_points_per_decile(chance):
    """Of what was judged, as it was said just before; the first steps, in which nothing is known, aside."""
    noise, confidence, found = np.random.default_rng(1), Confidence(), []
    for step in range(400):
        said = 1 / (1 + np.exp(-noise.uniform(-5, 8, 64)))
        if step >= 50:
            found.append(np.stack([confidence.chances(0, said), chance(0, said)]))
        confidence.observe(said[:, None], np.ones((64, 1), bool), noise.random((64, 1)) < chance(0, said)[:, None])
    predicted, true = np.concatenate(found, 1)
    deciles = np.array_split(np.argsort(predicted), 10)
    assert max(abs(predicted[part].mean() - true[part].mean()) for part in deciles) < 0.03


def test_before_anything_is_known_more_probable_is_likelier():
    chances = Confidence().chances(0, np.linspace(0, 1, 50))
    assert (np.diff(chances) >= 0).all() and chances[0] < 0.1 and chances[-1] == MOST


def test_what_is_no_probability_has_hardly_a_chance():
    said = np.array([np.nan, -0.1, 2.0, np.inf, -np.inf, 0.9])
    chances = Confidence().chances(0, said)
    assert (chances[[0, 2, 3]] == 0).all() and (chances[[1, 4]] < 0.05).all() and chances[5] > 0.9
    Confidence().observe(said[:, None], np.ones((6, 1), bool), np.ones((6, 1), bool))


def test_further_places_share_the_last_table():
    confidence, deep = Confidence(), DEPTHS + 3
    confidence.observe(np.full((500, deep), 0.5), np.ones((500, deep), bool), np.zeros((500, deep), bool))
    assert confidence.chances(deep, np.array([0.5]))[0] < 0.05


def test_reset_leaves_what_is_expected():
    confidence = learned(lambda i, p: 1 - p)
    certain = confidence.chances(0, np.array([0.9]))[0]
    confidence.reset(16)
    weaker = confidence.chances(0, np.array([0.9]))[0]
    confidence.reset(0)
    assert certain < weaker < confidence.chances(0, np.array([0.9]))[0] == Confidence().chances(0, np.array([0.9]))[0]


def test_it_is_kept_in_json():
    confidence = learned(lambda i, p: p)
    same = Confidence.from_json(json.loads(json.dumps(confidence.to_json())))
    assert (same.table() == confidence.table()).all()
    with pytest.raises(ValueError, match="shape"):
        Confidence.from_json({"judged": [[1.0]], "true": [[1.0]]})


def test_sure_rows_go_deep_and_doubtful_ones_stop():
    made = plan(3, 4, guess=0.3, confidence=learned(lambda i, p: np.where(p > 0.5, 0.95, 0.05)))
    for said in ([0.99, 0.9, 0.02], [0.99, 0.1, 0.99], [0.99, 0.99, 0.99]):
        made.further(np.array(said))
    assert made.budgets().tolist() == [3, 1, 0]


def test_alike_they_take_what_is_best_for_all():
    made = plan(2, 4, guess=0.5, ragged=False, confidence=learned(lambda i, p: p))
    for said in ([0.99, 0.9], [0.99, 0.3], [0.5, 0.05]):
        made.further(np.array(said))
    assert made.budgets().tolist() == [2, 2]


def test_no_guess_is_verified_that_is_not_worth_it():
    made = plan(2, 3, guess=1.1)
    made.further(np.array([0.99, 0.99]))
    assert made.budgets().tolist() == [0, 0]


def test_drafting_stops_where_no_next_guess_would_be_worth_it():
    sure = plan(2, 4, guess=0.3, draft=0.3)
    assert sure.further(np.array([0.99, 0.99]))
    doubtful = plan(2, 4, guess=0.3, draft=0.3)
    assert not doubtful.further(np.array([0.02, 0.02]))
    one_of_two = plan(2, 4, guess=0.3, draft=0.3)
    assert one_of_two.further(np.array([0.99, 0.02]))
    dear = plan(2, 4, guess=0.3, draft=3.0)
    assert not dear.further(np.array([0.99, 0.99]))


def test_the_last_guess_ends_it():
    made = plan(1, 2, guess=0.0)
    assert made.further(np.array([0.9])) and not made.further(np.array([0.9]))
    assert made.depth == 2


def test_a_plan_learns_from_the_guess_after_the_last_verified_one():
    made = plan(4, 2, guess=0.1)
    for _ in range(2):
        made.further(np.full(4, 0.5))
    budgets, true = np.array([2, 2, 0, 1]), np.array([2, 0, 1, 0])
    judged = made.learn(budgets, true, ended=np.array([False, False, False, True]))
    assert judged == [(3, 2), (1, 1)]  # the fourth row ended before its guess; the third was judged once, unverified


MACHINE = [Measurement("verify", b, t, 0, 0.01 + 1e-4 * b * t) for b in (1, 64) for t in (1, 8)]
MACHINE += [Measurement("draft", b, t, 0, 1e-3 * t) for b in (1, 64) for t in (1, 7)]


def controller() -> GammaController:
    found = GammaController(CostModel(MACHINE), 7)
    for _ in range(40):
        gamma = found.choose(8, 0)
        found.observe(
            StepStats(8, gamma, 0, 8 + 7 * gamma, [7] * gamma, verify_s=0.0108 + 8e-4 * gamma + 1e-3 * gamma)
        )
    return found


def test_the_controller_plans_where_it_guesses():
    found = controller()
    assert found.choose(8, 0) > 0
    made = found.plan(8, 0, ragged=True)
    assert made.widest == 7 and len(made.prices.verifying) == 57 and made.prices.worth > 8 / 0.0108
    assert (np.diff(made.prices.verifying) >= 0).all() and (np.diff(made.prices.drafting) > 0).all()


def test_it_plans_nothing_where_it_does_not_guess_or_probes():
    found = controller()
    found.draft_ready = False
    assert found.choose(8, 0) == 0 and found.plan(8, 0, ragged=True) is None
    probing = controller()
    probing.choose(8, 0)
    probing._reference = (1.0, 1.0)
    assert probing.plan(8, 0, ragged=True) is None


def test_planned_steps_teach_costs_and_acceptance():
    found = controller()
    before = found.cost.ragged_seconds(8, 7, 0)[0][20]
    for _ in range(30):
        found.observe(
            StepStats(8, 4, 0, 24, [8, 4, 2, 2], 0.006, 0.02, offered=[8, 6, 4, 2], depth=4, judged=[(8, 8)] * 4)
        )
    verifying, drafting = found.cost.ragged_seconds(8, 7, 0)
    assert verifying[20] > 1.3 * before  # 26 ms where 16.8 were calibrated
    assert drafting[4] == pytest.approx(0.006, rel=0.1)
    assert min(found.acceptance.rates(4)) > 0.95
