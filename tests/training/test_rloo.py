"""`SpecRLOOTrainer`: what is learned does not depend on speculation, and TRL's options keep working."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from peft import LoraConfig
from trl import RLOOConfig

from spec_rollout.config import SpecConfig
from spec_rollout.training import SpecRLOOConfig, SpecRLOOTrainer
from spec_rollout.training.config import spec_config
from tests.training.test_grpo import assert_same, trained

VARIATIONS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
    "reuse": {"steps_per_generation": 2, "num_iterations": 2},
    "processed": {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.2},
    "masked": {"mask_truncated_completions": True, "normalize_advantages": True, "beta": 0.0},
}


@pytest.fixture
def make_rloo(make_trainer):
    return partial(make_trainer, SpecRLOOTrainer, SpecRLOOConfig)


@pytest.mark.parametrize("variation", VARIATIONS)
def test_speculation_leaves_training_as_it_is(make_rloo, peeking, variation):
    plain = trained(make_rloo(num_speculative_tokens=0, **VARIATIONS[variation]))
    speculative = trained(make_rloo(num_speculative_tokens=3, **VARIATIONS[variation]))
    assert_same(plain, speculative)
    logged = [entry for entry in speculative.state.log_history if "speculative/acceptance_rate" in entry]
    assert logged and all(entry["speculative/mean_acceptance_length"] > 2 for entry in logged)


def test_a_resumed_run_is_the_uninterrupted_one(make_rloo, eager_head):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "num_speculative_tokens": 2}
    whole = trained(make_rloo(**saving))
    checkpoint = Path(whole.args.output_dir, "checkpoint-2")
    assert (checkpoint / "draft").is_dir()
    assert_same(whole, trained(make_rloo(**saving | {"num_speculative_tokens": 0})))
    resumed = trained(make_rloo(**saving), resume_from_checkpoint=str(checkpoint))
    whole.reward_funcs[0].seen = whole.reward_funcs[0].seen[2:]
    assert_same(whole, resumed)
    assert any(entry.get("speculative/acceptance_rate", 0) > 0 for entry in resumed.state.log_history)


def test_a_lora_policy_with_a_penalty(make_rloo, peeking):
    lora = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)}
    plain = trained(make_rloo(num_speculative_tokens=0, beta=0.1, arguments=lora))
    speculative = trained(make_rloo(num_speculative_tokens=3, beta=0.1, arguments=lora))
    assert_same(plain, speculative)
    assert speculative.state.log_history[0]["speculative/mean_acceptance_length"] > 2
    assert speculative.state.log_history[0]["kl"] != 0


def test_configuration_of_trl_itself(make_trainer, peeking):
    trainer = trained(make_trainer(SpecRLOOTrainer, RLOOConfig))
    assert trainer.sampler.config == SpecConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_vllm": True}, "use_vllm=True .*use_vllm=False"),
        ({"use_transformers_continuous_batching": True}, "use_transformers_continuous_batching=True"),
        ({"num_speculative_tokens": -1}, "num_speculative_tokens=-1 is negative"),
        ({"max_completion_length": None}, "max_completion_length=None"),
        ({"temperature": 0.0}, r"temperature=0.0 .*above 0"),
        ({"generation_kwargs": {"num_beams": 4}}, "num_beams=4"),
    ],
)
def test_conflicts_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SpecRLOOConfig(str(tmp_path), bf16=False, use_cpu=True, **options)


def test_spec_config_takes_its_share(tmp_path):
    args = SpecRLOOConfig(str(tmp_path), num_speculative_tokens=4, learning_rate=0.5, bf16=False, use_cpu=True)
    assert spec_config(args) == SpecConfig(num_speculative_tokens=4)


def test_more_than_text_is_refused(make_rloo, peeking):
    with pytest.raises(ValueError, match=r"images.*text-only"):
        make_rloo()._generate_single_turn([[5]], [[object()]], {})
