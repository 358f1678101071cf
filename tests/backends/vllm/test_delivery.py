"""Policy and draft reach an engine, a false one here, or it is told what did not arrive."""

import pytest

from spec_rollout.backends.vllm.backend import VLLMBackend
from spec_rollout.backends.vllm.readback import probe
from spec_rollout.config import SpecConfig
from spec_rollout.gamma import GammaController
from spec_rollout.records import Completion, SamplingParams, StepStats
from tests.tiny import policy, tokenizer


class FakeEngine:
    """A `VLLMEngine` whose completions are one token long and whose guesses all fail."""

    verification = "coupled"

    def __init__(self, live_schedule=True, sleeps=False):
        self.live_schedule, self.sleeps, self.asleep = live_schedule, sleeps, False
        self.held, self.probed, self.pushes, self.steps = [0, 0], {}, 0, []

    def generate(self, prompts, params, limits=None, keys=None):
        assert not self.asleep
        rows, gamma = len(prompts), self.controller.choose(len(prompts), 0)
        self.steps.append(StepStats(rows, gamma, 0, rows, [0] * gamma, verify_s=0.001 * (gamma + 1)))
        self.controller.observe(self.steps[-1])
        return [Completion([1], [0.0], "length") for _ in prompts]

    def load(self, draft, version):
        self.asleep, self.held, self.probed = False, [version] * 2, probe(dict(draft))
        self.pushes += 1

    def versions(self):
        return [0, 0] if self.asleep else self.held

    def draft_probe(self):
        return [self.probed]

    def near_ties(self):
        return 0

    def control(self, controller):
        self.controller = controller

    def take_steps(self):
        taken, self.steps = self.steps, []
        return taken, 0.0

    def sleep(self):
        self.asleep = self.sleeps


def fake_backend(engine, trained=False, **options):
    backend = VLLMBackend(policy("llama"), SpecConfig(**{"max_slots": 4, **options}), lambda *_: engine)
    backend.learner.trained = trained
    return backend


def test_a_verification_that_was_not_asked_for_is_told_once():
    engine = FakeEngine()
    engine.verification = "rejection"
    backend = fake_backend(engine)
    with pytest.warns(RuntimeWarning, match="judged by rejection sampling") as told:
        backend.generate([[1, 2]])
        backend.generate([[1, 2]])
    assert len(told) == 1
    fake_backend(engine, verification="rejection").generate([[1, 2]])


@pytest.mark.parametrize("trained", [False, True])
def test_a_sleeping_engine_is_measured_while_it_is_awake(trained):
    engine = FakeEngine(sleeps=True)
    backend = fake_backend(engine, trained)
    backend.generate([[1, 2]] * 4)
    backend.refresh()
    assert isinstance(backend.controller, GammaController)
    backend.learner.trained = True
    backend.generate([[1, 2]] * 4)
    assert engine.pushes == 2 and sum(step.rows for step in backend.take_stats().steps) == 8


def test_a_loaded_head_is_pushed_whatever_its_version(tmp_path):
    engine = FakeEngine()
    backend = fake_backend(engine, num_speculative_tokens=3)
    backend.save(tmp_path / "draft")
    for _ in range(2):
        backend.generate([[1, 2]])
    assert engine.pushes == 1
    backend.load(tmp_path / "draft")
    backend.generate([[1, 2]])
    assert engine.pushes == 2


@pytest.mark.parametrize(
    ("live", "learns", "message"),
    [
        (True, True, "The draft head is off .* until it has learned again"),
        (True, False, "The draft head is off .* for good, as draft_refresh=False"),
        (False, True, "The draft head guesses in vain, as vLLM was started to, until it has learned again"),
    ],
)
def test_a_fall_to_chance_is_told_as_it_is(tmp_path, monkeypatch, live, learns, message):
    monkeypatch.setattr("spec_rollout.draft.watchman.WATCHED", 1)
    fake_backend(FakeEngine()).save(tmp_path / "draft")
    options = {"num_speculative_tokens": 3, "draft_refresh": learns, "draft_model_path": str(tmp_path / "draft")}
    backend = fake_backend(FakeEngine(live), trained=True, **options)
    with pytest.warns(RuntimeWarning, match=message):
        backend.generate([[1, 2]] * 4)
    assert not backend.draft_healthy


@pytest.mark.parametrize(
    ("live", "message"), [(True, "The draft head is off"), (False, "vLLM guesses with another draft until")]
)
def test_a_draft_that_did_not_arrive_is_told_as_it_is(monkeypatch, live, message):
    monkeypatch.setattr(FakeEngine, "draft_probe", lambda self: [{}])
    with pytest.warns(RuntimeWarning, match=message):
        fake_backend(FakeEngine(live), trained=True, num_speculative_tokens=3).generate([[1, 2]])


def test_a_restart_between_a_push_and_its_read_back_is_not_the_end(monkeypatch):
    engine = FakeEngine()
    load = engine.load

    def load_and_restart(draft, version):
        load(draft, version)
        engine.held, engine.load = [0, 0], load

    engine.load = load_and_restart
    with pytest.warns(RuntimeWarning, match="starts with after version 1 was pushed. The rollout is drawn again"):
        assert len(fake_backend(engine, num_speculative_tokens=3).generate([[1, 2]] * 4)) == 4
    assert engine.pushes == 2 and engine.held == [2, 2] and len(engine.steps) == 0


def test_recurrent_layers_are_sampled_plainly():
    with pytest.raises(ValueError, match="Lfm2ForCausalLM has recurrent layers.*num_speculative_tokens=0"):
        VLLMBackend(policy("lfm2"), SpecConfig(), lambda *_: FakeEngine())
    assert VLLMBackend(policy("lfm2"), SpecConfig(num_speculative_tokens=0), lambda *_: FakeEngine()).learner is None


def test_a_completion_ends_where_its_stop_string_is_complete():
    class Emitting(FakeEngine):
        """As vLLM, which looks for stop strings behind a step's last token."""

        def generate(self, prompts, params, limits=None, keys=None):
            drawn = super().generate(prompts, params)
            ids = words.convert_tokens_to_ids(["ab", "c", "dd", "a"])
            return [Completion(ids, [-float(i) for i in range(len(ids))], "stop") for _ in drawn]

    words = tokenizer()
    params = SamplingParams(stop_strings=("cd",))
    backend = VLLMBackend(policy("llama"), SpecConfig(max_slots=4), lambda *_: Emitting())
    backend.tokenizer = words
    found = backend.generate([[1, 2]] * 2, params)
    ended = words.convert_tokens_to_ids(["ab", "c", "dd"])
    assert [(c.token_ids, c.logprobs) for c in found] == [(ended, [0.0, -1.0, -2.0])] * 2
    assert len(backend.generate([[1, 2]], SamplingParams(stop_strings=("cc",)))[0].token_ids) == 4
    begun = words.convert_tokens_to_ids(["c", "b", "a"])  # as transformers has it, the string may begin in the prompt
    assert len(backend.generate([begun], SamplingParams(stop_strings=("baab",)))[0].token_ids) == 1
    with pytest.raises(ValueError, match="stop_strings=.'cd',. need a tokenizer.*give the engine its `tokenizer`"):
        fake_backend(Emitting()).generate([[1, 2]], params)
