"""A real vLLM server: weights that follow, and one that is killed in the middle of a rollout."""

import pytest
import torch

from spec_rollout.backends.vllm.backend import VLLMBackend
from spec_rollout.backends.vllm.server import Server
from spec_rollout.config import SpecConfig
from spec_rollout.engine.engine import RolloutEngine
from tests.backends.vllm.process import Process
from tests.backends.vllm.tiny import GREEDY, PROMPTS, ROWS, needs_vllm, save_policy, teach
from tests.tiny import VOCAB, assert_same, tokenizer

pytestmark = [needs_vllm, pytest.mark.usefixtures("patient_watchman")]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The server's process, and a backend that draws from it."""
    folder = tmp_path_factory.mktemp("server")
    model = save_policy(folder / "policy", tie_word_embeddings=True, vocab_size=VOCAB)
    tokenizer().save_pretrained(folder / "policy")
    process = Process(folder / "policy", folder / "log")
    url = process.url
    config = SpecConfig(max_slots=ROWS, num_speculative_tokens=3)
    backend = VLLMBackend(model, config, lambda *_: Server(url, model.named_parameters, config, 120))
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


@pytest.mark.parametrize("after", ["_draw", "_told"])  # a rollout; a push that has just begun
def test_a_server_that_is_killed_and_comes_back_costs_no_sample(server, monkeypatch, after):
    process, backend = server
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in backend.model.parameters():
            weight.add_(0.03 * torch.randn(weight.shape, generator=noise))
    backend.policy_version += 1
    many = PROMPTS * 20
    expected = RolloutEngine(backend.model).generate(PROMPTS, GREEDY)
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
        drawn = backend.generate(many, GREEDY)
    assert_same(drawn, expected * 20)
    assert backend.take_stats().emitted == len(many) * GREEDY.max_new_tokens
