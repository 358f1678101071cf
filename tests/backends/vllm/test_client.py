"""What the client of a vLLM server asks, refuses and survives; no server runs."""

from collections import Counter
from contextlib import nullcontext

import pytest

from spec_rollout.backends.vllm.engine import EngineRestarted
from spec_rollout.backends.vllm.served import refuse_lossy, refuse_other_guesses
from spec_rollout.backends.vllm.server import LONGEST_S, Server
from spec_rollout.backends.vllm.steps import EMITTED, ServedSteps
from spec_rollout.config import SpecConfig
from spec_rollout.records import SamplingParams


@pytest.fixture
def server():
    """The client of a server that is not there."""
    server = object.__new__(Server)
    server.url, server.timeout, server.model, server.headers = "http://here", 7.0, "policy", {}
    server.verification = "rejection"
    return server


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speculative_config": {"rejection_sample_method": "synthetic"}}, "rejection_sample_method='synthetic'"),
        ({"model_config": {"logprobs_mode": "raw_logprobs"}}, "logprobs_mode='raw_logprobs'.*processed_logprobs"),
    ],
)
def test_a_lossy_server_is_refused(change, message):
    good = {"speculative_config": None, "model_config": {"logprobs_mode": "processed_logprobs"}}
    refuse_lossy("http://here", good)
    with pytest.raises(ValueError, match=f"http://here runs with {message}"):
        refuse_lossy("http://here", {**good, **change})


def test_a_server_that_is_lost_while_it_is_asked_is_a_restart(server, monkeypatch):
    def refuse(*given, **options):
        raise ConnectionResetError("gone")

    monkeypatch.setattr("spec_rollout.backends.vllm.connection.urlopen", refuse)
    monkeypatch.setattr(Server, "_await_health", lambda self: None)
    with pytest.raises(EngineRestarted, match="http://here: It was lost"):
        server.versions()


def test_an_unreachable_server_is_named():
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:1 after 0 seconds.*spec-rollout serve"):
        Server("http://127.0.0.1:1/", dict, SpecConfig(), timeout=0)


def test_an_address_without_a_scheme_is_named_at_once():
    with pytest.raises(ValueError, match=r"vllm_server_base_url='localhost:8000' .* write http://HOST:PORT"):
        Server("localhost:8000", dict, SpecConfig(), timeout=1000)


@pytest.mark.parametrize(("path", "bound"), [("/metrics", 7), ("/v1/completions", LONGEST_S)])
def test_a_server_that_hangs_ends_the_run(server, monkeypatch, path, bound):
    found = []

    def hang(request, timeout=None):
        found.append(timeout)
        raise TimeoutError

    monkeypatch.setattr("spec_rollout.backends.vllm.connection.urlopen", hang)
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
def test_a_server_that_guesses_other_numbers_is_refused(schedule, options, message):
    parts = [[1 + 4 * i, 4 + 4 * i, number] for i, number in enumerate(schedule)]
    config = {"num_speculative_tokens": max(schedule), "num_speculative_tokens_per_batch_size": parts} if parts else {}
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        refuse_other_guesses("http://here", config, SpecConfig(**options))


@pytest.mark.parametrize("speculates", [True, False])
def test_min_p_is_served_by_a_server_without_speculation(server, monkeypatch, speculates):
    sent = []
    monkeypatch.setattr(Server, "_request", lambda self, path, body, seconds: sent.append(body) or {"choices": []})
    server.speculates = speculates
    with pytest.raises(ValueError, match="min_p=0.1") if speculates else nullcontext():
        server._draw([[1]], SamplingParams(min_p=0.1), 4)
    assert [body["min_p"] for body in sent] == ([] if speculates else [0.1])


@pytest.mark.parametrize("there", ["nothing", "another server's mark"])
def test_a_folder_that_is_not_seen_is_sent_to_with_a_key_only(server, monkeypatch, tmp_path, there):
    if there != "nothing":
        (tmp_path / "mark").write_text(there)
    monkeypatch.setattr(Server, "_call", lambda *given: [[str(tmp_path), "mine"]])
    with pytest.raises(
        ConnectionError, match=r"http://here reads .* serve --weights DIR.* over HTTP.* need a key: set"
    ):
        server._folder()
    server.headers = {"Authorization": "Bearer key"}
    assert server._folder() == (None, "mine")
    (tmp_path / "mark").write_text("mine")
    assert server._folder() == (tmp_path, "mine")


def test_what_a_server_draws_is_counted_from_its_restart_on(server, monkeypatch):
    """Whether the restart is seen while it is asked, or by its counters alone."""
    replies = [Counter({EMITTED: 100}), EngineRestarted("gone"), Counter({EMITTED: 30}), Counter({EMITTED: 20})]

    def counted(self):
        reply = replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    monkeypatch.setattr(Server, "_counters", counted)
    ServedSteps.__init__(server)
    server._watched = Counter({EMITTED: 60}), 0.0
    found = []
    while replies:
        server.watch()
        found.append(sum(step.emitted for step in server.take_steps()[0]))
    assert found == [40, 0, 30, 20]
