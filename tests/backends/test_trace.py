"""Recording changes no token, counts what happened, and survives a file."""

from __future__ import annotations

import json

import pytest

from spec_rollout.backends.trace import PLACE, TraceRecorder, read_traces
from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import RefreshStats, SamplingParams
from tests.tiny import PROMPTS, Scripted, policy

PARAMS = SamplingParams(max_new_tokens=40, eos_token_ids=(4,))


def plain():
    return RolloutEngine(policy("llama")).generate(PROMPTS, PARAMS)


def recorded(recorder, known):
    engine = RolloutEngine(
        policy("llama"), SpecConfig(max_slots=4), drafter=OracleDrafter(known), controller=Scripted(0, 3, 1)
    )
    engine.recorder = recorder
    return engine.generate(PROMPTS, PARAMS), engine


def test_a_recorded_rollout_is_the_same_and_its_sums_are_those_of_the_completions():
    recorder, known = TraceRecorder(4), plain()
    completions, engine = recorded(recorder, known)
    assert [c.token_ids for c in completions] == [c.token_ids for c in known]
    assert engine.stats.mean_acceptance_length > 1
    (trace,) = recorder.rollouts
    assert trace.completion_tokens == [len(c.token_ids) for c in completions]
    assert trace.prompt_tokens == [len(p) for p in PROMPTS]
    assert trace.group == [0, 0, 2, 3, 2, 5, 0]
    assert trace.steps == engine.stats.steps and trace.slots == 4
    assert sum(trace.num_steps) == sum(s.rows for s in trace.steps)
    assert sum(trace.num_accepted) == sum(sum(s.accepted) for s in trace.steps)
    assert trace.tokens == sum(s.emitted for s in trace.steps)
    assert 0 < trace.prefill_s < trace.seconds == engine.stats.seconds
    assert all(0 < s.sample_s < s.host_s for s in trace.steps)


def test_places_count_the_passes_with_guesses_where_they_began():
    recorder, known = TraceRecorder(4), plain()
    recorded(recorder, known)
    (trace,) = recorder.rollouts
    guessing = [s for s in trace.steps if s.gamma]
    assert sum(trace.place_passes) == sum(s.rows for s in guessing)
    assert sum(trace.place_emitted) == sum(s.emitted for s in guessing)
    longest = max(trace.completion_tokens)
    assert longest > PLACE and len(trace.place_passes) == (longest - 1) // PLACE + 1


def test_a_second_rollout_starts_counting_anew():
    recorder, known = TraceRecorder(4), plain()
    for _ in range(2):
        recorded(recorder, known)
    assert recorder.rollouts[0].place_passes == recorder.rollouts[1].place_passes


def test_a_file_holds_what_was_recorded_and_the_last_of_equal_labels_counts(tmp_path):
    memory, known = TraceRecorder(4), plain()
    recorded(memory, known)
    path = tmp_path / "rollouts" / "rank-0.jsonl"
    for step in (0, 1, 1):
        recorder = TraceRecorder(4, path, {"step": step})
        recorded(recorder, known)
        recorder.refresh(RefreshStats(seconds=step))
    trace = read_traces([path])
    assert [r.labels for r in trace.rollouts] == [{"step": 0}, {"step": 1}]
    assert [r["seconds"] for r in trace.refreshes] == [0, 1]
    assert "loss" not in trace.refreshes[0]  # not a number
    for found in trace.rollouts:
        assert found.place_emitted == memory.rollouts[0].place_emitted
        assert [s.accepted for s in found.steps] == [s.accepted for s in memory.rollouts[0].steps]


def test_a_line_that_was_not_written_to_its_end_is_left_out(tmp_path):
    path, known = tmp_path / "trace.jsonl", plain()
    for step in (0, 1):
        recorded(TraceRecorder(4, path, {"step": step}), known)
    path.write_text(path.read_text()[:-9])
    assert [r.labels for r in read_traces([path]).rollouts] == [{"step": 0}]
    recorded(TraceRecorder(4, path, {"step": 2}), known)  # a resumed run goes on in the same file
    assert [r.labels for r in read_traces([path]).rollouts] == [{"step": 0}, {"step": 2}]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("no json\n", "line 1"),
        (json.dumps({"version": 99, "kind": "rollout"}) + "\n", "of version 99"),
        (json.dumps({"version": 1, "kind": "rollout", "labels": {}}) + "\n", "line 1"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path, text, what):
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=what):
        read_traces([path])
