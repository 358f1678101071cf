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
    return Prices(1 + np.arange(depth + 1) * rows * guess, np.arange(depth + 1) * draft, 1.0)


def plan(rows, depth, guess, draft=0.0, confidence=None, rate=0.8):
    return Plan(confidence or Confidence(), [rate] * depth, prices(rows, depth, guess, draft), rows)


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


def test_it_verifies_what_is_best_for_all_rows():
    made = plan(2, 4, guess=0.5, confidence=learned(lambda i, p: p))
    for said in ([0.99, 0.9], [0.99, 0.3], [0.5, 0.05]):
        made.further(np.array(said))
    assert made.verified() == 2


def test_no_guess_is_verified_that_is_not_worth_it():
    made = plan(2, 3, guess=1.1)
    made.further(np.array([0.99, 0.99]))
    assert made.verified() == 0


def test_drafting_stops_where_no_next_guess_would_be_worth_it():
    sure = plan(2, 4, guess=0.3, draft=0.3)
    assert sure.further(np.array([0.99, 0.99]))
    doubtful = plan(2, 4, guess=0.3, draft=0.3)
    assert not doubtful.further(np.array([0.02, 0.02]))
    one_of_two = plan(2, 4, guess=0.2, draft=0.3)
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
    judged = made.learn(1, np.array([2, 0, 1, 0]), ended=np.array([False, False, False, True]))
    assert judged == [(3, 2), (2, 1)]  # the fourth row ended before its first guess


MACHINE = [Measurement("verify", b, t, 0, 0.01 + 1e-4 * b * t) for b in (1, 64) for t in (1, 8)]
MACHINE += [Measurement("draft", b, t, 0, 1e-3 * t) for b in (1, 64) for t in (1, 7)]


def controller() -> GammaController:
    found = GammaController(CostModel(MACHINE), 7)
    for _ in range(40):
        gamma = found.choose(1, 0)
        found.observe(StepStats(1, gamma, 0, 1 + gamma, [1] * gamma, verify_s=0.0101 + 11e-4 * gamma))
    return found


def test_the_controller_plans_a_single_row_where_it_guesses():
    found = controller()
    assert found.choose(1, 0) > 0
    made = found.plan(1, 0)
    assert made.widest == 7 and len(made.prices.verifying) == len(made.prices.drafting) == 8
    assert made.prices.worth > 1 / 0.0101 and made.prices.verifying[0] == pytest.approx(0.0101, rel=0.05)
    assert (np.diff(made.prices.verifying) >= 0).all() and (np.diff(made.prices.drafting) > 0).all()
    assert found.choose(8, 0) > 0 and found.plan(8, 0) is None


def test_it_plans_nothing_where_it_does_not_guess_or_probes():
    found = controller()
    found.draft_ready = False
    assert found.choose(1, 0) == 0 and found.plan(1, 0) is None
    probing = controller()
    probing.choose(1, 0)
    probing._reference = (1.0, 1.0)
    assert probing.plan(1, 0) is None


def test_planned_steps_teach_costs_and_acceptance():
    found = controller()
    before = found.cost.split_seconds(1, 7, 0)[0][3]
    for _ in range(30):
        found.observe(StepStats(1, 3, 0, 2, [1, 0, 0], 0.006, 0.02, depth=4, judged=[(1, 1)] * 4))
    verifying, drafting = found.cost.split_seconds(1, 7, 0)
    assert verifying[3] > 1.3 * before  # 26 ms where 14.4 were calibrated
    assert drafting[4] == pytest.approx(0.004)  # as calibrated: what one guess more takes
    assert min(found.acceptance.rates(4)) > 0.95
