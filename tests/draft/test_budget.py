"""Draft training takes a share of the run, early rather than late, and no more than it brings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec_rollout.draft.budget import FIRST_SHARE, YOUNG_SHARE, RefreshBudget


def test_a_run_of_known_length_lends_to_its_first_steps():
    budget = RefreshBudget(0.05)
    budget.earn(10.0)
    assert budget.seconds(remaining=99) == pytest.approx(FIRST_SHARE * 0.05 * 1000)
    assert budget.seconds(remaining=0) == 0  # nothing will be sampled any more
    assert budget.seconds(remaining=None) > budget.seconds(remaining=10) > 0
    budget.spend(10.0, worth=100.0)
    assert budget.seconds(remaining=99) == pytest.approx(YOUNG_SHARE * (0.05 * 1000 - 10))


def test_what_paid_may_take_twice_as_long_and_what_did_not_waits():
    budget = RefreshBudget(0.5)
    budget.earn(10.0)
    budget.spend(1.0, worth=3.0)
    assert budget.seconds(None) == 2.0
    budget.spend(2.0, worth=1.0)
    assert budget.seconds(None) == 0.0
    budget.earn(10.0)
    assert 0 < budget.seconds(None) < 1.0


def test_a_draft_that_does_not_pay_is_tried_again_now_and_then():
    budget = RefreshBudget(0.05)
    allowed = []
    for _ in range(200):
        budget.earn(10.0)
        allowed.append(budget.seconds(None))
        if allowed[-1] > 0.3:  # the least that a training takes
            budget.spend(0.3, worth=0.0)
    tries = sum(seconds > 0.3 for seconds in allowed[100:])
    assert 10 <= tries <= 30
    assert budget.spent < 0.3 * 0.05 * budget.elapsed


@given(
    st.lists(st.tuples(st.floats(0.1, 20), st.floats(0, 2), st.booleans()), min_size=1, max_size=60),
    st.floats(0.01, 0.5),
    st.integers(0, 60),
)
def test_a_run_never_spends_more_than_its_share(steps, overhead, young):
    """Whatever the trainings take of what they are allowed, whatever they bring, and whenever the head settles."""
    budget = RefreshBudget(overhead)
    for number, (seconds, share, paid) in enumerate(steps):
        budget.earn(seconds)
        ahead = len(steps) - number - 1
        spent = min(share, 1.0) * budget.seconds(ahead, settled=number >= young)
        budget.spend(spent, worth=1e9 if paid else 0.0)
        whole = budget.elapsed + ahead * budget.step_seconds  # of the run, as far as can be told
        assert spent == 0 or budget.spent <= overhead * whole + 1e-9


@pytest.mark.parametrize("young", [0, 10, 100])
def test_equal_steps_end_within_the_share(young):
    budget = RefreshBudget(0.05)
    for number in range(100):
        budget.earn(10.0)
        budget.spend(budget.seconds(99 - number, settled=number >= young), worth=1e9)
    assert 0.9 * 50 < budget.spent <= 50 + 1e-9


def test_a_settled_head_has_something_to_spend_until_the_end():
    budget, allowed = RefreshBudget(0.05), []
    for number in range(100):
        budget.earn(10.0)
        allowed.append(budget.seconds(99 - number, settled=True))
        budget.spend(allowed[-1], worth=1e9)
    assert allowed[0] == pytest.approx(2 * 0.5)
    assert all(seconds > 0.25 * 0.5 for seconds in allowed[:50])
    assert allowed == sorted(allowed, reverse=True)


def test_state_continues():
    one, two = RefreshBudget(0.05), RefreshBudget(0.05)
    one.earn(10.0)
    one.spend(2.0, worth=5.0)
    two.load_state_dict(one.state_dict())
    for budget in (one, two):
        budget.earn(4.0)
    assert two.seconds(7) == one.seconds(7) > 0
