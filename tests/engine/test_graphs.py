"""Recorded passes: all but the recording, which only a GPU can do."""

from __future__ import annotations

import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft import lean_head
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.lean import choice, graphs
from spec_rollout.records import SamplingParams
from tests.engine.test_waits import head
from tests.tiny import PROMPTS, Scripted, assert_same, make_policy, policy, reference

PARAMS = SamplingParams(max_new_tokens=14)


class Reruns:
    """In the place of `CudaGraphs`: a replay runs the pass again."""

    works = True

    def __init__(self):
        self.recordings = self.replays = 0

    def record(self, run):
        self.recordings += 1
        run()

        def replay():
            self.replays += 1
            run()

        return replay


@pytest.fixture
def reruns(monkeypatch) -> Reruns:
    made = Reruns()
    for module in (choice, lean_head):
        monkeypatch.setattr(module, "recorder", lambda device: made)
    return made


def engine(model, slots: int = 6, compile_passes: str = "true") -> RolloutEngine:
    config = SpecConfig(max_slots=slots, compile_passes=compile_passes)
    return RolloutEngine(model, config=config, drafter=head(model), controller=Scripted(0, 1, 3, 2))


@pytest.mark.parametrize("compile_passes", ["true", "auto"])
@pytest.mark.parametrize("slots", [1, 3, 6])
def test_the_same_tokens(reruns, slots, compile_passes):
    model = policy("llama")
    made = engine(model, slots, compile_passes)
    for _ in range(2):  # the second rollout finds the counts of the first
        assert_same(made.generate(PROMPTS, PARAMS), reference(model, PROMPTS, PARAMS))
    assert made.target.path == "lean graphs"
    assert made.stats.mean_acceptance_length > 1
    assert reruns.replays > 20


def test_a_policy_that_is_trained_meanwhile(reruns):
    model = make_policy("llama")
    made = engine(model)
    made.generate(PROMPTS, PARAMS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert_same(made.generate(PROMPTS, PARAMS), reference(model, PROMPTS, PARAMS))


def test_few_shapes_are_recorded(reruns):
    for number in (1, 2, 5, 8):
        assert graphs.rows_recorded(number) == number
    for number in range(1, 400):
        assert number <= graphs.rows_recorded(number) <= max(number * 5 / 4, number)
        assert number <= graphs.extent_recorded(number) <= max(number * 5 / 4, number + graphs.EXTENT_STEP - 1)
    assert len({graphs.rows_recorded(rows) for rows in range(1, 257)}) == 28


def test_a_recording_serves_until_the_slots_are_laid_out_anew(reruns):
    config = SpecConfig(max_slots=1, compile_passes="true", num_speculative_tokens=3)
    model = make_policy("llama", max_position_embeddings=512)
    made = RolloutEngine(model, config=config, drafter=head(model))
    made.generate([[1, 2, 3]], SamplingParams(max_new_tokens=400))
    assert reruns.recordings < reruns.replays / 8


def test_what_does_not_record(monkeypatch):
    class Broken:
        works = True

        def record(self, run):
            raise graphs.NotCompilableError.of("a decode pass as a CUDA graph", "operation not permitted")

    for module in (choice, lean_head):
        monkeypatch.setattr(module, "recorder", lambda device: Broken() if Broken.works else None)
    with pytest.raises(ValueError, match=r"cannot compile a decode pass as a CUDA graph \(operation not permitted"):
        engine(policy("llama")).generate(PROMPTS, PARAMS)
    made = engine(policy("llama"), compile_passes="auto")
    with pytest.warns(RuntimeWarning, match="it is decoded without from here on") as told:
        assert_same(made.generate(PROMPTS, PARAMS), reference(policy("llama"), PROMPTS, PARAMS))
    assert len(told) == 1
    made.generate(PROMPTS, PARAMS)
    assert made.target.path == "lean"
