"""Policies with virtual tokens (PEFT's prompt and prefix tuning) in the trainers."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import PrefixTuningConfig, PromptTuningConfig
from trl import GRPOConfig, GRPOTrainer

from spec_rollout.config import SpecConfig
from spec_rollout.training import (
    SpecGRPOConfig,
    SpecGRPOTrainer,
    SpecRLOOConfig,
    SpecRLOOTrainer,
    make_rollout_func,
)
from spec_rollout.training.padding import roll
from tests.training.test_grpo import assert_same, trained

TUNINGS = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}
TRAINERS = {"grpo": (SpecGRPOTrainer, SpecGRPOConfig), "rloo": (SpecRLOOTrainer, SpecRLOOConfig)}
RAGGED = Dataset.from_dict({"prompt": ["one and two", "a", "count to ten", "b c d"]})


def tuning(name: str):
    return TUNINGS[name](task_type="CAUSAL_LM", num_virtual_tokens=4)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("name", TUNINGS)
def test_speculation_leaves_training_as_it_is(make_trainer, eager_head, name, kind):
    def run(gamma):
        arguments = {"peft_config": tuning(name), "train_dataset": RAGGED}
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


@pytest.mark.parametrize("name", TUNINGS)
def test_trls_own_trainer_reads_padded_rows_as_they_were_sampled(make_trainer, peeking, name):
    rollout_func = make_rollout_func(SpecConfig(num_speculative_tokens=2))
    arguments = {"peft_config": tuning(name), "train_dataset": RAGGED, "rollout_func": rollout_func}
    options = {"gradient_checkpointing": False, "steps_per_generation": 2, "num_iterations": 2}
    trainer = make_trainer(GRPOTrainer, GRPOConfig, arguments=arguments, **options)
    batches, score = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append(score(inputs)) or batches[-1]
    trained(trainer)
    for batch in batches:
        difference = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]) * batch["completion_mask"]
        assert (batch["prompt_mask"] == 0).any() and difference.abs().max() < 1e-4


def test_rows_are_rolled_one_by_one():
    rows = torch.arange(8).view(2, 4)
    assert roll(rows, torch.tensor([[1], [-2]])).tolist() == [[3, 0, 1, 2], [6, 7, 4, 5]]


def test_ppo_has_no_values_for_virtual_tokens(make_ppo):
    with pytest.raises(ValueError, match="PPOTrainer cannot train virtual tokens"):
        make_ppo(arguments={"peft_config": tuning("prompt")})


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
