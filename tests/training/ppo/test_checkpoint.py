"""Checkpoints carry policy, value function and KL coefficient; a resumed run ends where the uninterrupted one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.training.conftest import PROMPTS
from tests.training.test_grpo import assert_same, trained

SAVING = {"save_strategy": "steps", "save_steps": 4, "kl_target": 0.01, "kl_horizon": 20}
"""A checkpoint after each generation, with a KL coefficient that moves."""


@pytest.mark.parametrize("kind", ["head", "critic", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one(make_ppo, eager_head, tmp_path, kind):
    arguments = {"train_dataset": Dataset.from_dict({"prompt": PROMPTS * 2})}
    if kind == "lora":
        arguments["peft_config"] = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    options = SAVING | {"arguments": arguments}
    options["value_model"] = str(tmp_path / "policy") if kind == "critic" else None
    whole = trained(make_ppo(**options))
    checkpoint = Path(whole.args.output_dir, "checkpoint-4")
    assert json.loads((checkpoint / "kl_controller.json").read_text())["kl_coef"] != 0.1
    resumed = trained(make_ppo(**options), resume_from_checkpoint=str(checkpoint))
    whole.reward_funcs[0].seen = whole.reward_funcs[0].seen[1:]
    assert_same(whole, resumed)
    assert whole.kl_controller.coef == resumed.kl_controller.coef
    assert any(entry.get("speculative/mean_acceptance_length", 1) > 1 for entry in whole.state.log_history)


def test_the_policy_is_saved_as_it_is_without_ppo(make_ppo, peeking, tmp_path, recwarn):
    trainer = trained(make_ppo())
    trainer.save_model(tmp_path / "saved")
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(found.values())
    head = load_file(tmp_path / "saved" / "value_head.safetensors")
    assert torch.equal(head["weight"], trainer.value_function.weight) and head["weight"].any()


def test_a_saved_critic_is_a_model_of_its_own(make_ppo, peeking, tmp_path):
    trainer = trained(make_ppo(value_model=str(tmp_path / "policy")))
    trainer.save_model(tmp_path / "saved")
    saved, found = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved" / "value_model", output_loading_info=True
    )
    assert not any(found.values()) and saved.score.weight.any()
    assert torch.equal(saved.score.weight, trainer.value_function.model.score.weight)
    again = make_ppo(value_model=str(tmp_path / "saved" / "value_model"))
    assert torch.equal(saved.score.weight, again.value_function.model.score.weight)


@pytest.mark.parametrize("critic", [False, True])
def test_a_checkpoint_without_a_value_function_is_refused(make_ppo, make_trainer, peeking, tmp_path, critic):
    grpo = trained(make_trainer(save_strategy="steps", save_steps=2, max_steps=2))
    trainer = make_ppo(value_model=str(tmp_path / "policy") if critic else None)
    with pytest.raises(ValueError, match=r"checkpoint-2 holds no value_.*not a checkpoint of PPO"):
        trainer.train(resume_from_checkpoint=f"{grpo.args.output_dir}/checkpoint-2")
