"""The cost model: what it predicts from a calibration."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_rollout.gamma import CostModel, Measurement
from tests.gamma.simulation import ROWS, TOKENS, Machine, exact_model


def test_noiseless_grid_points_are_reproduced():
    machine, model = Machine(), exact_model()
    for rows in ROWS:
        expected = [machine.calibrated_verify(rows, t, 900) for t in TOKENS]
        assert model.verify_seconds(rows, TOKENS, 900) == pytest.approx(expected, rel=1e-9)
        assert model.draft_seconds(rows, [0, 1, 3, 7]) == pytest.approx([machine.draft(rows, g) for g in (0, 1, 3, 7)])


def test_between_grid_points_only_the_kink_is_rounded_off():
    machine, model = Machine(), exact_model()
    errors = np.array(
        [
            model.verify_seconds(rows, [tokens], 512)[0] / machine.calibrated_verify(rows, tokens, 512) - 1
            for rows in (3, 6, 11, 24, 48)
            for tokens in (3, 5, 6, 7)
        ]
    )
    assert errors.min() > -0.01
    assert np.median(errors) < 0.02
    assert errors.max() < 0.2


def test_beyond_the_grid_cost_goes_on_with_the_work():
    machine, model = Machine(attention_s=0.0), exact_model(Machine(attention_s=0.0))
    # More rows than measured: as dear as the widest measured batch at equally many tokens.
    assert model.verify_seconds(128, [1])[0] == pytest.approx(model.verify_seconds(64, [2])[0])
    for rows, tokens in ((128, 8), (512, 1), (64, 16), (200, 3)):
        truth = machine.calibrated_verify(rows, tokens, 0)
        assert model.verify_seconds(rows, [tokens])[0] == pytest.approx(truth, rel=0.02)
    assert model.draft_seconds(256, [12])[0] == pytest.approx(machine.draft(256, 12))


def test_missing_cells_follow_rows_times_tokens():
    machine = Machine(attention_s=0.0)
    cells = [(r, t) for r in ROWS for t in TOKENS if r * t <= 128]
    model = CostModel(Measurement("verify", r, t, 0, machine.calibrated_verify(r, t, 0)) for r, t in cells)
    for rows, tokens in ((64, 8), (32, 8), (64, 4)):
        truth = machine.calibrated_verify(rows, tokens, 0)
        assert model.verify_seconds(rows, [tokens])[0] == pytest.approx(truth, rel=0.05)


cells = st.dictionaries(
    st.tuples(st.integers(1, 64), st.sampled_from((1, 2, 3, 4, 8))), st.floats(1e-5, 10.0), min_size=1, max_size=24
)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(verify=cells, draft=cells, slopes=st.tuples(st.floats(-1e-4, 1e-3), st.floats(-1e-4, 1e-3)))
def test_more_work_never_looks_cheaper(verify, draft, slopes):
    measurements = [Measurement("verify", r, t, 100, s) for (r, t), s in verify.items()]
    measurements += [
        Measurement("verify", r, t, 2000, max(1e-6, s + r * (slopes[0] + slopes[1] * t)))
        for (r, t), s in verify.items()
    ]
    measurements += [Measurement("draft", r, t, 100, s) for (r, t), s in draft.items()]
    model = CostModel(measurements)
    for context in (0, 5000):
        rows, tokens = [*range(1, 70, 4), 96, 128, 200], np.arange(1, 13)
        passes = np.array([model.verify_seconds(r, tokens, context) for r in rows])
        guesses = np.array([model.draft_seconds(r, tokens) for r in rows])
        for table in (passes, guesses):
            assert table.min() > 0
            slack = 1e-9 * table.max()
            assert np.diff(table, axis=0).min() >= -slack
            assert np.diff(table, axis=1).min() >= -slack


def test_one_spoiled_measurement_does_not_spoil_its_neighbours():
    machine = Machine()
    measurements = [
        Measurement("verify", r, t, 0, machine.calibrated_verify(r, t, 0) * (10 if (r, t) == (1, 1) else 1))
        for r in ROWS
        for t in TOKENS
    ]
    model = CostModel(measurements)
    for rows, tokens in ((1, 1), (1, 2), (2, 1), (8, 4)):
        ratio = model.verify_seconds(rows, [tokens])[0] / machine.calibrated_verify(rows, tokens, 0)
        assert 0.9 < ratio < 1.5


@pytest.mark.parametrize(("per_row", "per_token"), [(0.0, 3e-8), (5e-8, 0.0), (4e-8, 2e-8)])
def test_context_slopes_are_recovered(per_row, per_token):
    def seconds(rows, tokens, context):
        return 0.01 + 1e-4 * rows * tokens + rows * (per_row + per_token * tokens) * context

    grid = [(r, t, c) for r in (1, 4, 16) for t in (1, 4) for c in (128, 4096)]
    model = CostModel(Measurement("verify", r, t, c, seconds(r, t, c)) for r, t, c in grid)
    for rows, tokens, context in ((4, 1, 20_000), (16, 4, 0), (1, 4, 1000)):
        truth = seconds(rows, tokens, context)
        assert model.verify_seconds(rows, [tokens], context)[0] == pytest.approx(truth, rel=1e-6)


def test_repeated_measurements_count_with_their_median():
    model = CostModel(Measurement("verify", 1, 1, 0, s) for s in (0.01, 0.011, 0.5))
    assert model.verify_seconds(1, [1])[0] == pytest.approx(0.011)


def test_without_draft_measurements_drafting_is_free():
    model = CostModel([Measurement("verify", 1, 1, 0, 0.01)])
    assert model.draft_seconds(4, [0, 3]).tolist() == [0, 0]


def test_below_the_measured_lengths_drafting_is_proportional():
    model = CostModel([Measurement("verify", 1, 1, 0, 0.01), Measurement("draft", 1, 4, 0, 0.02)])
    assert model.draft_seconds(1, [0, 1, 2, 4]) == pytest.approx([0, 0.005, 0.01, 0.02])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kind": "prefill"}, "kind='prefill'"),
        ({"rows": 0}, "rows=0"),
        ({"tokens": 0}, "tokens=0"),
        ({"context": -1}, "context=-1"),
        ({"seconds": 0.0}, "seconds=0.0"),
        ({"seconds": math.nan}, "seconds=nan"),
    ],
)
def test_impossible_measurements_are_refused(change, named):
    with pytest.raises(ValueError, match=named):
        Measurement(**{"kind": "verify", "rows": 1, "tokens": 1, "context": 0, "seconds": 0.1, **change})


def test_a_model_without_target_passes_is_refused():
    with pytest.raises(ValueError, match="measure at least one of kind 'verify'"):
        CostModel([Measurement("draft", 1, 1, 0, 0.1)])
    with pytest.raises(ValueError, match="host_seconds=-1"):
        CostModel([Measurement("verify", 1, 1, 0, 0.1)], host_seconds=-1)


def test_a_state_of_another_version_is_refused():
    state = exact_model().to_json()
    with pytest.raises(ValueError, match="calibrate again"):
        CostModel.from_json({"measurements": state["measurements"]})
    state["correction"]["deviation"] = [[0.0]]
    with pytest.raises(ValueError, match="calibrate again"):
        CostModel.from_json(state)


def test_attention_that_is_not_linear_spoils_no_short_context():
    """A long context eight times as dear as a short one says: what was measured at the short one still holds there."""
    short = [Measurement("verify", rows, t, 64, 0.05 + 1e-3 * rows * t) for rows in (1, 8) for t in (1, 4)]
    long = [Measurement("verify", m.rows, m.tokens, 1024, m.seconds * (8 if m.rows == 8 else 1.1)) for m in short]
    model = CostModel(short + long)
    for m in short:
        assert model.verify_seconds(m.rows, [m.tokens], 64)[0] == pytest.approx(m.seconds, rel=0.1)


def test_two_drafts_one_after_the_other_take_the_seconds_of_both():
    def draft(seconds):
        cells = [Measurement("verify", rows, 1, 10, 1.0) for rows in (1, 4)]
        return CostModel(cells + [Measurement("draft", rows, t, 10, seconds * t) for rows in (1, 4) for t in (1, 4)])

    both = draft(0.1).with_draft_of(draft(0.3))
    assert both.draft_seconds(2, [1, 2, 4]) == pytest.approx([0.4, 0.8, 1.6])
    assert both.verify_seconds(2, [1]) == pytest.approx([1.0]) and not both.learned
