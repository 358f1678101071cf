"""What calibration measures, keeps and leaves alone."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from spec_rollout.backends import calibration, kept_seconds
from spec_rollout.backends.calibration import measured_cost
from spec_rollout.backends.kept_seconds import path_of
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.gamma import Measurement
from spec_rollout.records import RolloutMemoryError
from tests.tiny import PROMPTS, make_policy

WIDEST = 3


@pytest.fixture(scope="module")
def engine():
    return RolloutEngine(make_policy("llama", max_position_embeddings=2048))


@pytest.fixture
def timed(monkeypatch):
    """Passes take 1 ms + 3 µs per row and token + (0.1 + 0.02 * tokens) µs per row and token of context. Lists the
    numbers of rows in the order of their measuring."""
    asked = []

    def verify(rollout, context, tokens):
        rows = rollout.rows.count
        asked.extend([rows] * (rows not in asked[-1:]))
        seconds = 1e-3 + 3e-6 * rows * tokens + (1e-7 + 2e-8 * tokens) * rows * context
        return Measurement("verify", rows, tokens, context, seconds)

    monkeypatch.setattr(calibration, "_verify", verify)
    return asked


def test_really_measured(engine, tmp_path):
    """Both contexts, from passes that ran; the engine has neither a larger cache nor other statistics."""
    cache, before = engine.cache, len(engine.stats.steps)
    cost = measured_cost(engine, 4, WIDEST, str(tmp_path))
    cells = {(m.rows, m.tokens, m.context) for m in cost._measurements}
    assert cells == {(r, t, 64) for r in (1, 2, 4) for t in (1, 2, 4)} | {
        (r, t, 1024) for r in (1, 2, 4) for t in (1, 4)
    }
    assert engine.cache is cache and cache.slots == 0 and len(engine.stats.steps) == before
    engine.generate(PROMPTS)


@pytest.mark.parametrize(("rows", "tokens", "context"), [(1, 1, 0), (4, 4, 300), (16, 2, 1000), (16, 4, 4000)])
def test_the_context_counts(engine, timed, tmp_path, rows, tokens, context):
    cost = measured_cost(engine, 16, WIDEST, str(tmp_path))
    truth = 1e-3 + 3e-6 * rows * tokens + (1e-7 + 2e-8 * tokens) * rows * context
    assert cost.verify_seconds(rows, [tokens], context)[0] == pytest.approx(truth, rel=0.01)


def test_only_what_is_missing_is_measured(engine, timed, tmp_path):
    few = measured_cost(engine, 4, WIDEST, str(tmp_path))
    assert sorted(timed) == [1, 2, 4]
    del timed[:]
    many = measured_cost(engine, 12, WIDEST, str(tmp_path))
    assert sorted(timed) == [8, 12]
    assert many._measurements[: len(few._measurements)] == few._measurements
    del timed[:]
    for slots in (12, 7, 1):
        assert measured_cost(engine, slots, WIDEST, str(tmp_path))._measurements == many._measurements
    assert timed == []


@pytest.mark.parametrize("busy", [1.0, 2.5, 4.0, 0.1])
def test_kept_times_of_a_busy_machine_are_measured_again(engine, timed, tmp_path, monkeypatch, busy):
    """A later run times two rows; those that took much longer before are no longer believed."""
    now, honest = busy, calibration._verify

    def verify(rollout, context, tokens):
        found = honest(rollout, context, tokens)
        return replace(found, seconds=found.seconds * (now if tokens > 1 else 1.0))

    monkeypatch.setattr(calibration, "_verify", verify)
    kept = measured_cost(engine, 8, WIDEST, str(tmp_path))._measurements
    for later in range(2):
        del timed[:]
        monkeypatch.setattr(calibration, "_trusted", set())
        now = 1.0
        wrong = busy > 3 and not later
        with pytest.warns(RuntimeWarning, match="takes 4 times less now") if wrong else nullcontext():
            found = measured_cost(engine, 8, WIDEST, str(tmp_path))._measurements
        assert sorted(timed) == ([1, 2, 4, 8] if wrong else [2])
        assert (found == kept) == (busy <= 3)


def test_the_largest_batches_come_first_only_in_so_far_as_there_is_time(engine, timed, tmp_path, monkeypatch):
    measured_cost(engine, 32, WIDEST, str(tmp_path / "enough"))
    assert timed == [2, 8, 32, 1, 4, 16]
    del timed[:]
    monkeypatch.setattr(calibration, "BUDGET_S", 0.0)
    cost = measured_cost(engine, 32, WIDEST, str(tmp_path / "none"))
    assert timed == [2]
    assert cost.verify_seconds(32, [1])[0] > cost.verify_seconds(2, [1])[0]
    assert measured_cost(engine, 32, WIDEST, str(tmp_path / "none"))._measurements == cost._measurements


def test_a_short_context_is_measured_alone(timed, tmp_path):
    cost = measured_cost(RolloutEngine(make_policy("llama")), 2, WIDEST, str(tmp_path))
    assert {m.context for m in cost._measurements} == {64}


def test_the_long_context_takes_bounded_memory(engine, timed, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "LONG_ENTRIES", 4 * 1024)
    cost = measured_cost(engine, 8, WIDEST, str(tmp_path))
    assert max(m.rows for m in cost._measurements if m.context == 1024) == 4


@pytest.mark.parametrize("change", ["dtype", "threads", "shape", "widest", "version"])
def test_another_machine_or_model_has_a_file_of_its_own(engine, tmp_path, monkeypatch, change):
    path = path_of(engine, WIDEST, str(tmp_path))
    assert path == path_of(engine, WIDEST, str(tmp_path)) and path.parent == tmp_path
    other, widest = engine, WIDEST + (change == "widest")
    if change == "dtype":
        other = RolloutEngine(make_policy("llama", torch.bfloat16, max_position_embeddings=2048))
    elif change == "shape":
        other = RolloutEngine(make_policy("llama", max_position_embeddings=2048, intermediate_size=64))
    elif change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    elif change == "version":
        monkeypatch.setattr(kept_seconds, "_version", lambda: "99")
    assert path_of(other, widest, str(tmp_path)) != path


@pytest.mark.parametrize("content", ["", "[1]", '{"slots": 9}', '{"slots": 9, "measurements": [{"kind": "verify"}]}'])
def test_a_file_that_cannot_be_read_is_measured_again(engine, timed, tmp_path, content):
    path = path_of(engine, WIDEST, str(tmp_path))
    path.write_text(content)
    measured_cost(engine, 1, WIDEST, str(tmp_path))
    assert timed == [1] and "seconds" in path.read_text()


def test_a_folder_that_cannot_be_written_is_said_and_costs_only_time(engine, timed, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="calibration_cache"):
        assert measured_cost(engine, 1, WIDEST, str(tmp_path / "file"))._measurements


def test_the_default_folder(engine, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert path_of(engine, WIDEST, None).parent == tmp_path / "spec_rollout"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of(engine, WIDEST, None).parent == tmp_path / ".cache" / "spec_rollout"


def test_batches_without_memory_are_left_out(engine, timed, tmp_path, monkeypatch):
    """They are reckoned from the others; if there are no others, the message says what to lower."""
    fits, honest = 8, calibration._verify

    def verify(rollout, context, tokens):
        if rollout.rows.count > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return honest(rollout, context, tokens)

    monkeypatch.setattr(calibration, "_verify", verify)
    with pytest.warns(RuntimeWarning, match="Memory ran out while passes of 32, 16 rows were timed"):
        cost = measured_cost(engine, 32, WIDEST, str(tmp_path / "some"))
    assert sorted(timed) == [1, 2, 4, 8]
    truth = 1e-3 + 3e-6 * 32 + (1e-7 + 2e-8) * 32 * 300
    assert cost.verify_seconds(32, [1], 300)[0] == pytest.approx(truth, rel=0.01)
    monkeypatch.setattr(calibration, "_trusted", set())
    del timed[:]
    fits = 16
    with pytest.warns(RuntimeWarning, match="passes of 32 rows"):
        measured_cost(engine, 32, WIDEST, str(tmp_path / "some"))
    assert timed == [2, 16]  # what there was no memory for is tried again
    fits = 0
    with pytest.raises(RolloutMemoryError, match="Lower max_slots .*Tried to allocate 9 GiB"):
        measured_cost(engine, 32, WIDEST, str(tmp_path / "none"))
    engine.generate(PROMPTS)
