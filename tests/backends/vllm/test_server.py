"""A real vLLM server: weights that follow, and one that is killed in the middle of a rollout."""

import pytest
import torch

from spec_rollout.backends.vllm.backend import VLLMBackend
from spec_rollout.backends.vllm.server import Server
from spec_rollout.config import SpecConfig
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import SamplingParams
from tests.backends.vllm.process import Process
from tests.backends.vllm.tiny import GREEDY, PROMPTS, ROWS, needs_vllm, save_policy, teach
from tests.tiny import VOCAB, assert_same, tokenizer

pytestmark = [needs_vllm, pytest.mark.usefixtures("patient_watchman")]

SAMPLED = SamplingParams(max_new_tokens=48, temperature=0.5, min_p=0.02)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The server's process, and a backend that draws from it."""
    folder = tmp_path_factory.mktemp("server")
    model = save_policy(folder / "policy", tie_word_embeddings=True, vocab_size=VOCAB)
    tokenizer().save_pretrained(folder / "policy")
    process = Process(folder / "policy", folder / "log")
    url = process.url
    config = SpecConfig(max_slots=ROWS, num_speculative_tokens=3)
    backend = VLLMBackend(model, config, lambda *_: Server(url, model.named_parameters, config, 600))
    yield process, backend
    process.kill()


def test_policy_and_draft_follow(server):
    backend = server[1]
    teach(backend)
    backend.take_stats()
    limits = [40 + i % 2 for i in range(len(PROMPTS))]
    drawn = backend.generate(PROMPTS, GREEDY, max_new_tokens=limits)
    assert_same(drawn, RolloutEngine(backend.model).generate(PROMPTS, GREEDY, max_new_tokens=limits))
    stats = backend.take_stats()
    assert backend.draft_healthy and stats.mean_acceptance_length > 2
    assert stats.emitted == sum(limits)


def test_what_is_drawn_follows_from_the_seed_here_too(server):
    backend = server[1]
    limits = [30 + i % 2 for i in range(len(PROMPTS))]
    drawn = backend.generate(PROMPTS, SAMPLED, seed=(3,), max_new_tokens=limits)
    assert backend.engine.verification == "coupled"
    expected = RolloutEngine(backend.model).generate(PROMPTS, SAMPLED, seed=(3,), max_new_tokens=limits)
    assert_same(drawn, expected)
    assert [c.token_ids for c in backend.generate(PROMPTS, SAMPLED, seed=(4,), max_new_tokens=limits)] != [
        c.token_ids for c in expected
    ]


@pytest.mark.parametrize("after", ["_draw", "_told"])  # a rollout; a push that has just begun
def test_a_server_that_is_killed_and_comes_back_costs_no_sample(server, monkeypatch, after):
    process, backend = server
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in backend.model.parameters():
            weight.add_(0.03 * torch.randn(weight.shape, generator=noise))
    backend.policy_version += 1
    many = PROMPTS * 20
    expected = RolloutEngine(backend.model).generate(many, SAMPLED, seed=(5,))
    backend.take_stats()

    whole = getattr(Server, after)

    def accident(self, *given, **options):
        done = whole(self, *given, **options)
        monkeypatch.setattr(Server, after, whole)
        process.kill()
        process.start()
        self._await_health()
        return done

    monkeypatch.setattr(Server, after, accident)
    with pytest.warns(RuntimeWarning, match="drawn again"):
        drawn = backend.generate(many, SAMPLED, seed=(5,))
    assert_same(drawn, expected)
    assert backend.take_stats().emitted == len(many) * SAMPLED.max_new_tokens
