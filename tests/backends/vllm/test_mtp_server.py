"""A server of a policy with experts and an MTP head of its own: both follow, at any number of guesses."""

import pytest
import torch

from spec_rollout.backends.vllm.backend import VLLMBackend
from spec_rollout.backends.vllm.server import Server
from spec_rollout.config import SpecConfig
from spec_rollout.draft.mtp import MtpHead
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import SamplingParams
from tests.backends.vllm.live_mtp import load
from tests.backends.vllm.process import Process
from tests.backends.vllm.test_mtp import GUESSES, learned_by_heart
from tests.backends.vllm.tiny import PROMPTS, ROWS, needs_vllm, teach
from tests.tiny import assert_same, tokenizer

pytestmark = [needs_vllm, pytest.mark.usefixtures("patient_watchman", "generous")]

GREEDY = SamplingParams(max_new_tokens=32, temperature=0)
WARM = SamplingParams(max_new_tokens=32)


def test_policy_and_head_follow(tmp_path):
    learned_by_heart("glm4_moe", tmp_path / "policy")
    tokenizer().save_pretrained(tmp_path / "policy")
    process = Process(tmp_path / "policy", tmp_path / "log", "--num_speculative_tokens", str(GUESSES))
    try:
        model = load(tmp_path / "policy")
        options = {"rollout_backend": "vllm", "max_slots": ROWS, "num_speculative_tokens": GUESSES}
        config = SpecConfig(draft_learning_rate=0.3, **options)

        def connect(speculative):
            return Server(process.url, model.named_parameters, config, 120, speculative=speculative)

        backend = VLLMBackend(model, config, connect)
        assert isinstance(backend.learner.head, MtpHead)
        follow(backend)
        refuse_another_head(process, model, config)
    finally:
        process.kill()


def follow(backend):
    model = backend.model
    assert_same(backend.generate(PROMPTS, GREEDY), RolloutEngine(model).generate(PROMPTS, GREEDY))
    assert backend.draft_healthy and backend.take_stats().mean_acceptance_length > 1.3
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.03 * weight.abs().mean() * torch.randn(weight.shape, generator=noise))
    backend.policy_version += 1
    teach(backend, rounds=3)
    backend.take_stats()
    assert_same(backend.generate(PROMPTS, GREEDY), RolloutEngine(model).generate(PROMPTS, GREEDY))
    assert backend.draft_healthy and backend.take_stats().mean_acceptance_length > 1.3
    drawn = backend.generate(PROMPTS, WARM, seed=(3,))
    assert backend.engine.verification == "coupled" and backend.take_stats().mean_acceptance_length > 1
    assert_same(drawn, RolloutEngine(model).generate(PROMPTS, WARM, seed=(3,)))
    with torch.no_grad():
        backend.learner.head.layers[0].mlp.experts.down_proj.mul_(1.05)
    tensors = backend.learner.head.apart()
    from spec_rollout.backends.vllm.draft import mismatch

    assert "mlp.experts responds" in mismatch(backend.engine, tensors, backend.delivery.version)


def refuse_another_head(process, model, config):
    """What a trainer of an EAGLE-3 head is told."""
    with pytest.raises(ValueError, match="guesses by method 'mtp', the trainer pushes a head for 'eagle3'"):
        Server(process.url, model.named_parameters, config, 120, speculative={"method": "eagle3"})
