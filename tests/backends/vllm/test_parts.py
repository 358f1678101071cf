"""The parts of the vLLM backend that need no vLLM."""

from argparse import Namespace
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from spec_rollout.backends.vllm import serve as vllm_serve
from spec_rollout.backends.vllm.backend import VLLMBackend
from spec_rollout.backends.vllm.draft import save_start, start_vocabulary
from spec_rollout.backends.vllm.engine import EngineRestarted, completion, sampling_options, speculative_config
from spec_rollout.backends.vllm.server import LONGEST_S, Server
from spec_rollout.backends.vllm.steps import Guesses, StepLog, step_stats
from spec_rollout.backends.vllm.worker import _expand, probe
from spec_rollout.config import SpecConfig
from spec_rollout.draft.checkpoint import load_head, save_head
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.gamma import FixedGamma, GammaController
from spec_rollout.records import Completion, SamplingParams, StepStats
from tests.tiny import make_policy, policy


class Watching(FixedGamma):
    """Keeps what it sees."""

    def __init__(self, gamma):
        super().__init__(gamma)
        self.seen = []

    def observe(self, stats):
        self.seen.append(stats)


def iteration(emitted, prompt_tokens=0, begun=0):
    return SimpleNamespace(
        num_generation_tokens=emitted, num_prompt_tokens=prompt_tokens, time_to_first_tokens_iter=[0.1] * begun
    )


def guessed(*numbers):
    return SimpleNamespace(spec_decoding_stats=Guesses(*numbers) if numbers else None)


def test_a_step_is_what_vllm_counted():
    log, controller = StepLog(limit=5), Watching(7)
    log.controller = controller
    assert log[3] == 5
    log.record(guessed(), iteration(4, prompt_tokens=40, begun=4))
    log.record(guessed(4, 12, 6, [3, 2, 1, 0, 0]), iteration(10))
    log.record(guessed(4, 12, 6, [3, 2, 1, 0, 0]), iteration(8))  # an end inside the guesses
    log.record(guessed(3, 9, 2, [1, 1, 0, 0, 0]), iteration(7, prompt_tokens=9, begun=2))  # two join
    log.record(guessed(), iteration(5))
    log.record(guessed(), None)
    steps, prefill_s = log.take()
    found = [(s.rows, s.gamma, s.emitted, s.accepted) for s in steps]
    assert found == [
        (4, 0, 4, []),
        (4, 3, 10, [3, 2, 1]),
        (4, 3, 8, [3, 2, 1]),
        (2, 0, 2, []),
        (3, 3, 5, [1, 1, 0]),
        (5, 0, 5, []),
    ]
    assert controller.seen == [steps[1], steps[2], steps[5]] and all(s.seconds > 0 for s in controller.seen)
    assert prefill_s > 0 and log.take() == ([], 0.0)


def test_no_counters_mean_no_guesses():
    assert step_stats(3, None).rows == 3 and step_stats(3, Guesses(0, 0, 0, [])).gamma == 0


def test_options_in_vllms_words():
    params = SamplingParams(max_new_tokens=7, top_k=4, eos_token_ids=(2,), stop_strings=("x",))
    options = sampling_options(params, 3, speculates=True)
    assert options["max_tokens"] == 3 and options["stop_token_ids"] == [2] and not options["ignore_eos"]
    assert options["stop"] == ["x"] and options["include_stop_str_in_output"]
    assert sampling_options(SamplingParams(min_p=0.1), None, speculates=False)["min_p"] == 0.1
    with pytest.raises(ValueError, match=r"min_p=0.1 cannot be honoured.*embedded"):
        sampling_options(SamplingParams(min_p=0.1), None, speculates=True)


@pytest.mark.parametrize(
    ("ids", "given", "reason"),
    [([5, 2], "stop", "eos"), ([5, 6], "stop", "stop"), ([5, 6], "length", "length"), ([5, 2], "length", "length")],
)
def test_why_a_completion_ended(ids, given, reason):
    assert completion(ids, [0.0, 0.0], given, (2,)).finish_reason == reason


def test_each_guess_gets_its_rows_value():
    temperature, ends = torch.tensor([0.5, 0.0, 2.0, 3.0]), torch.tensor([2, 3, 3, 6])
    assert _expand(temperature, ends, 6, replace_from=0, replace_to=1).tolist() == [0.5, 0.5, 1.0, 3.0, 3.0, 3.0]


def test_every_layer_shows_in_the_probe():
    head = EagleHead(HeadConfig.for_target(policy("llama").config))
    tensors = {**head.folded(), "lm_head.weight": torch.randn(9, 32), "d2t": torch.arange(9)}
    before = probe(tensors)
    for name in tensors:
        changed = {**tensors, name: tensors[name] * 1.5 + 1}
        assert [key for key in before if before[key] != probe(changed)[key]], name


def test_the_head_to_start_with_cannot_share_by_accident(tmp_path):
    shape = HeadConfig.for_target(make_policy("llama", vocab_size=9000).config)
    for own, size in ((None, 8192), (9000, None), (17, 17)):
        head = EagleHead(shape, own_output=own)
        given = torch.arange(17) if own == 17 else None
        ids = start_vocabulary(shape.vocab_size, given, head)
        assert (None if ids is None else len(ids)) == size
        weights = {name: tensor.clone() for name, tensor in head.state_dict().items()}
        save_start(tmp_path / "start", head, ids)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in head.state_dict().items())
        loaded, _, _ = load_head(tmp_path / "start", shape)
        assert loaded.own_output is None or not loaded.own_output.any()


def test_a_small_vocabulary_shares_the_policys_output_head(tmp_path):
    from safetensors.torch import load_file

    shape = HeadConfig.for_target(policy("llama").config)
    save_start(tmp_path / "start", EagleHead(shape), start_vocabulary(shape.vocab_size, None, EagleHead(shape)))
    assert not {"lm_head.weight", "d2t"} & load_file(tmp_path / "start" / "model.safetensors").keys()


def test_vllm_is_asked_for_lossless_speculation():
    config = speculative_config("folder", 4, 16)
    assert config["rejection_sample_method"] == "standard" and config["draft_sample_method"] == "probabilistic"
    assert config["num_speculative_tokens_per_batch_size"] == [[1, 16, 4]]


def test_the_command_of_a_server(tmp_path):
    policy("llama").save_pretrained(tmp_path / "policy")
    given = Namespace(
        policy=str(tmp_path / "policy"), draft=None, num_speculative_tokens=2, max_slots=4, host="127.0.0.1", port=8001
    )
    line = " ".join(vllm_serve.serve_command(given, tmp_path / "draft"))
    assert "--host 127.0.0.1 --port 8001" in line and "--logprobs-mode processed_logprobs" in line
    assert '"num_speculative_tokens": 2' in line and str(tmp_path / "draft") in line
    given.num_speculative_tokens = 0
    assert "speculative" not in " ".join(vllm_serve.serve_command(given, tmp_path / "draft"))
    given.num_speculative_tokens, given.draft = 2, str(tmp_path)
    with pytest.raises(ValueError, match="not a readable draft head"):
        vllm_serve.serve_command(given, tmp_path / "draft")
    head, given.draft = EagleHead(HeadConfig.for_target(policy("llama").config)), str(tmp_path / "head")
    for measured in (None, FixedGamma(2).state_dict()):
        save_head(given.draft, head, None, None, {"controller": {"vllm": measured}})
        assert "[[1, 4, 2]]" in " ".join(vllm_serve.serve_command(given, tmp_path / "draft"))


@pytest.fixture
def server():
    """The client of a server that is not there."""
    server = object.__new__(Server)
    server.url, server.timeout, server.model = "http://here", 7.0, "policy"
    return server


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speculative_config": {"rejection_sample_method": "synthetic"}}, "rejection_sample_method='synthetic'"),
        ({"model_config": {"logprobs_mode": "raw_logprobs"}}, "logprobs_mode='raw_logprobs'.*processed_logprobs"),
    ],
)
def test_a_lossy_server_is_refused(server, change, message):
    good = {"speculative_config": None, "model_config": {"logprobs_mode": "processed_logprobs"}}
    server._refuse_lossy(good)
    with pytest.raises(ValueError, match=f"http://here runs with {message}"):
        server._refuse_lossy({**good, **change})


def test_a_server_that_is_lost_while_it_is_asked_is_a_restart(server, monkeypatch):
    def refuse(*given, **options):
        raise ConnectionResetError("gone")

    monkeypatch.setattr("spec_rollout.backends.vllm.server.urlopen", refuse)
    monkeypatch.setattr(Server, "_await_health", lambda self: None)
    with pytest.raises(EngineRestarted, match="http://here: It was lost"):
        server.versions()


def test_an_unreachable_server_is_named(tmp_path):
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:1 after 0 seconds.*spec-rollout serve"):
        Server("http://127.0.0.1:1/", dict, tmp_path, SpecConfig(), timeout=0)


@pytest.mark.parametrize(("path", "bound"), [("/metrics", 7), ("/v1/completions", LONGEST_S)])
def test_a_server_that_hangs_ends_the_run(server, monkeypatch, path, bound):
    found = []

    def hang(request, timeout=None):
        found.append(timeout)
        raise TimeoutError

    monkeypatch.setattr("spec_rollout.backends.vllm.server.urlopen", hang)
    with pytest.raises(ConnectionError, match=f"http://here has not answered {path} within {bound:.0f} seconds"):
        if path == "/metrics":
            server._counters()
        else:
            server.speculates = True
            server._draw([[1]], SamplingParams(), 4)
    assert found == [bound]


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        ([3], {}, None),
        ([3, 0], {}, None),
        ([3], {"num_speculative_tokens": 3}, None),
        ([], {"num_speculative_tokens": 0}, None),
        ([3], {"num_speculative_tokens": 0}, "=0 asks for 0 in each step, but .*http://here .* guess 3"),
        ([3], {"num_speculative_tokens": 2}, "=2 asks for 2 in each step, but .* guess 3"),
        ([3, 0], {"num_speculative_tokens": 3}, "=3 asks for 3 in each step, but .* guess 0 or 3"),
        ([3], {"max_num_speculative_tokens": 2}, "=None asks for .* at most max_num_speculative_tokens=2, .* guess 3"),
        ([], {}, "=None asks for at least 1 .* guess 0: .* 0 for plain decoding"),
    ],
)
def test_a_server_that_guesses_other_numbers_is_refused(server, schedule, options, message):
    parts = [[1 + 4 * i, 4 + 4 * i, number] for i, number in enumerate(schedule)]
    config = {"num_speculative_tokens": max(schedule), "num_speculative_tokens_per_batch_size": parts} if parts else {}
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        server._refuse_other_guesses(config, SpecConfig(**options))


@pytest.mark.parametrize("speculates", [True, False])
def test_min_p_is_served_by_a_server_without_speculation(server, monkeypatch, speculates):
    sent = []
    monkeypatch.setattr(Server, "_request", lambda self, path, body, seconds: sent.append(body) or {"choices": []})
    server.speculates = speculates
    with pytest.raises(ValueError, match="min_p=0.1") if speculates else nullcontext():
        server._draw([[1]], SamplingParams(min_p=0.1), 4)
    assert [body["min_p"] for body in sent] == ([] if speculates else [0.1])


class FakeEngine:
    """A `VLLMEngine` whose completions are one token long and whose guesses all fail."""

    def __init__(self, live_schedule=True, sleeps=False):
        self.live_schedule, self.sleeps, self.asleep = live_schedule, sleeps, False
        self.held, self.probed, self.pushes, self.steps = [0, 0], {}, 0, []

    def generate(self, prompts, params, limits=None):
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
        return self.probed

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
        (False, True, "The draft head guesses in vain on the server until it has learned again"),
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
    ("live", "message"), [(True, "The draft head is off"), (False, "The server guesses with another draft until")]
)
def test_a_draft_that_did_not_arrive_is_told_as_it_is(monkeypatch, live, message):
    monkeypatch.setattr(FakeEngine, "draft_probe", lambda self: {})
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
