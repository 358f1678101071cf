"""GRPO on policies with recurrent layers: what is learned does not depend on speculation."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.engine.target import Target
from tests.tiny import unprobed
from tests.tiny_configs import HYBRIDS, SIZES
from tests.training.test_grpo import assert_same, trained


@pytest.fixture(params=["qwen3_5_text", "lfm2", "bamba"])
def make_policy(request, tokenizer):
    def make():
        ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
        options = {**SIZES, "max_position_embeddings": 128, **HYBRIDS[request.param], **ids}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, initializer_range=0.2, **options))
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.2)  # that of the padding too
        return model

    return make


def test_speculation_leaves_training_as_it_is(make_trainer, peeking):
    plain = trained(make_trainer(num_speculative_tokens=0))
    speculative = trained(make_trainer(num_speculative_tokens=3, max_slots=6))
    assert_same(plain, speculative)
    logged = [entry for entry in speculative.state.log_history if "speculative/acceptance_rate" in entry]
    assert logged and all(entry["speculative/mean_acceptance_length"] > 2 for entry in logged)


def test_a_learning_head_leaves_training_as_it_is(make_trainer, eager_head):
    plain = trained(make_trainer(num_speculative_tokens=0))
    fixed = trained(make_trainer(num_speculative_tokens=2))
    adaptive = trained(make_trainer(num_speculative_tokens=None))
    for speculative in (fixed, adaptive):
        assert_same(plain, speculative)
        assert speculative.sampler.backend.draft_version >= 1
    assert any(entry.get("speculative/acceptance_rate", 0) > 0 for entry in fixed.state.log_history)


def test_a_state_that_follows_rejected_guesses_is_noticed(make_trainer, eager_head, monkeypatch):
    plain = trained(make_trainer(num_speculative_tokens=0))
    honest = SlotCache.commit
    monkeypatch.setattr(Target, "_probe", unprobed)  # it would notice first
    monkeypatch.setattr(SlotCache, "commit", lambda self, tokens: honest(self, torch.full_like(tokens, 2)))
    with pytest.raises(AssertionError):
        assert_same(plain, trained(make_trainer(num_speculative_tokens=2)))
