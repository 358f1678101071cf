"""Policies with virtual tokens (PEFT's prompt and prefix tuning) in the trainers."""

from __future__ import annotations

import pytest
from datasets import Dataset
from peft import PrefixTuningConfig, PromptTuningConfig

from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer, SpecRLOOConfig, SpecRLOOTrainer
from tests.training.test_grpo import assert_same, trained

TUNINGS = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}
TRAINERS = {"grpo": (SpecGRPOTrainer, SpecGRPOConfig), "rloo": (SpecRLOOTrainer, SpecRLOOConfig)}
EVEN = Dataset.from_dict({"prompt": ["one and two", "count to te", "the quick b", "hello there"]})  # no padding


def tuning(name: str):
    return TUNINGS[name](task_type="CAUSAL_LM", num_virtual_tokens=4)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("name", TUNINGS)
def test_speculation_leaves_training_as_it_is(make_trainer, eager_head, name, kind):
    def run(gamma):
        arguments = {"peft_config": tuning(name), "train_dataset": EVEN}
        # a prefix is a cache, which transformers drops where it checkpoints gradients
        options = {"num_speculative_tokens": gamma, "gradient_checkpointing": False}
        return trained(make_trainer(*TRAINERS[kind], arguments=arguments, **options))

    plain, speculative = run(0), run(2)
    assert_same(plain, speculative)
    assert any(entry.get("speculative/acceptance_rate", 0) > 0 for entry in speculative.state.log_history)
    differences = [
        entry["sampling/sampling_logp_difference/max"]
        for entry in speculative.state.log_history
        if "sampling/sampling_logp_difference/max" in entry
    ]
    assert differences and max(differences) < 1e-4


def test_virtual_tokens_take_their_part_of_the_context(make_trainer, peeking):
    long = Dataset.from_dict({"prompt": ["a" * 113] * 2})  # 113 + 12 + 4 > 128
    arguments = {"peft_config": tuning("prompt"), "train_dataset": long}
    trainer = make_trainer(arguments=arguments)
    with pytest.raises(ValueError, match=r"113 tokens; .*context of 124 tokens.*the last 112 tokens"):
        trainer.train()
    trained(make_trainer(arguments=arguments, overlong_prompts="clip", max_steps=1))


def test_vllm_takes_no_virtual_tokens(make_trainer, monkeypatch):
    monkeypatch.setattr("spec_rollout.training.config.require_vllm", lambda: None)
    arguments = {"peft_config": tuning("prompt")}
    with pytest.raises(ValueError, match="virtual tokens .*rollout_backend='embedded'"):
        make_trainer(arguments=arguments, rollout_backend="vllm", calibration_cache=None)
