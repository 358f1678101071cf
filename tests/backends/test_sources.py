"""Who is predicted to be fastest."""

import math

import pytest

from spec_rollout.backends.sources import JointSource, ModelSource, NgramSource, Source, Sources
from spec_rollout.config import SpecConfig
from spec_rollout.draft.ngrams import History
from spec_rollout.gamma import CostModel, GammaController, Measurement
from spec_rollout.records import StepStats
from tests.tiny import DEVICE

TRACE = [StepStats(4, 0, 10, 4, [])] * 10


def cost(draft: float) -> CostModel:
    """A pass takes a second whatever its shape, each guess of four rows `draft` seconds."""
    cells = [Measurement("verify", 4, t, 10, 1.0) for t in (1, 8)]
    return CostModel(cells + [Measurement("draft", 4, t, 10, draft * t) for t in (1, 7)])


def sources(head=0.03, table=0.01, gamma=None) -> Sources:
    """All of them, calibrated, but for the model that there is not."""
    config = SpecConfig(num_speculative_tokens=gamma)
    history = History(DEVICE)
    history.add([([1], [2, 3, 4, 5]), ([1], [2, 3, 4, 5])])
    own, ngrams = Source(config), NgramSource(config, history)
    found = Sources(own, ngrams, ModelSource(config), JointSource(config, own, ngrams))
    for source, draft in ((own, head), (ngrams, table)) if gamma is None else ():
        source.controller, source.calibrate = GammaController(cost(draft), 7), lambda *given: None
        source._calibrated = 4, None
    return found


def fastest(found, table, head):
    found.ngrams.history.acceptance = table
    return found.fastest(None, 4, TRACE, head)


def test_both_together_guess_where_that_repays_two_guesses():
    assert fastest(sources(), [0.6], [0.6]) == "both"
    assert fastest(sources(), [0.6], [0.1]) == "ngrams"
    assert fastest(sources(head=1.0), [0.6], [0.6]) == "ngrams"
    assert fastest(sources(table=1.0), [0.6], [0.6]) == "head"
    assert fastest(sources(), [0.6], None) == "ngrams"
    assert fastest(sources(), [0.01], [0.9]) == "head"


def test_seconds_are_not_added_to_passes():
    """At a fixed number of guesses passes are compared, however long the table took."""
    found = sources(gamma=3)
    found.ngrams.history.seconds = 100.0
    found.ngrams.calibrate = found.head.calibrate = lambda *given: None
    assert fastest(found, [0.6], [0.6]) == "both" and fastest(found, [0.6], None) == "ngrams"
    assert (
        found.ngrams.expected_seconds(None, 4, TRACE) < 1 and found.joint.expected_seconds(None, 4, TRACE)([0.6]) < 1
    )
    adaptive = sources()
    adaptive.ngrams.history.seconds = 100.0
    assert fastest(adaptive, [0.6], [0.1]) == "head"


def test_what_any_but_the_head_would_take_depends_on_the_head():
    found = sources()
    found.ngrams.history.acceptance = [0.6]
    otherwise = found.otherwise(None, 4, TRACE)
    assert otherwise([0.8]) < otherwise([0.6]) < otherwise([0.0]) == pytest.approx(otherwise([0.0, 0.0]))
    found.joint.config = SpecConfig(verification="rejection")
    assert found.joint.expected_seconds(None, 4, TRACE)([0.9]) == math.inf


def test_a_source_that_has_not_guessed_yet_is_judged_by_what_real_steps_of_another_took():
    """All steps take twice what was calibrated: the source that has seen it must not look the slower for it."""
    found = sources(head=0.01, table=0.01)
    for _ in range(50):
        found.ngrams.controller.cost.observe(StepStats(4, 0, 10, 4, [], verify_s=2.0))
    seconds = [source.seconds(TRACE, [0.5]) for source in (found.ngrams, found.head)]
    assert seconds[0] == pytest.approx(seconds[1]) and not found.head.controller.cost.learned
    for _ in range(50):
        found.head.controller.cost.observe(StepStats(4, 0, 10, 4, [], verify_s=1.0))
    assert found.head.seconds(TRACE, [0.5]) == pytest.approx(seconds[0] / 2, rel=0.05)
