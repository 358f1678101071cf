"""A draft that has stopped working is off within a few steps, and says why."""

import warnings

import pytest
import torch

from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.watchman import WATCHED, Watchman
from spec_rollout.gamma import FixedGamma
from spec_rollout.records import StepStats


def step(rate, rows=64, gamma=3):
    first = round(rate * rows)
    return StepStats(rows, gamma, 100, rows + first, [first, 0, 0])


def tiny_head():
    return EagleHead(HeadConfig(4, 4, 1, 1, 4, vocab_size=8, aux_layers=(0, 1, 2)))


def watch(expected, head=None, learns=True):
    return Watchman(FixedGamma(3), head or tiny_head(), expected, learns)


def test_a_fall_to_chance_is_caught_within_four_steps_of_64_rows():
    watchman = watch(0.7)
    with pytest.warns(RuntimeWarning, match=r"is off .*: 1\.6% of its first guesses came true, after 70% when"):
        for _ in range(WATCHED // 64):
            assert watchman.choose(64, 100) == 3
            watchman.observe(step(0.02))
    assert watchman.choose(64, 100) == 0 and watchman.alarm
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning, not one per step
        watchman.observe(step(0.0))


def test_the_fall_is_caught_after_a_good_start():
    watchman = watch(0.7)
    for _ in range(100):
        watchman.observe(step(0.7))
    with pytest.warns(RuntimeWarning):
        for _ in range(2 * WATCHED // 64):
            watchman.observe(step(0.0))
    assert watchman.alarm


@pytest.mark.parametrize(("expected", "rate"), [(0.7, 0.4), (0.2, 0.1), (None, 0.1)])
def test_a_poor_draft_is_the_controllers_business(expected, rate):
    watchman = watch(expected)
    for _ in range(50):
        watchman.observe(step(rate))
    assert watchman.alarm is None and watchman.choose(64, 100) == 3


def test_a_head_of_unknown_quality_that_guesses_blindly_is_caught():
    watchman = watch(None)
    with pytest.warns(RuntimeWarning, match="not this policy's"):
        for _ in range(4):
            watchman.observe(step(0.02))


def test_weights_that_are_not_finite_are_named():
    head = tiny_head()
    with torch.no_grad():
        head.fc.weight[0, 0] = float("nan")
    watchman = watch(0.7, head)
    with pytest.warns(RuntimeWarning, match="weights are not finite"):
        for _ in range(4):
            watchman.observe(step(0.0))


def test_a_head_that_does_not_learn_is_off_for_good():
    watchman = watch(0.7, learns=False)
    with pytest.warns(RuntimeWarning, match="for good, as draft_refresh=False"):
        for _ in range(4):
            watchman.observe(step(0.0))


def test_plain_steps_say_nothing():
    watchman = watch(0.7)
    for _ in range(50):
        watchman.observe(StepStats(64, 0, 100, 64, []))
    assert watchman.alarm is None
