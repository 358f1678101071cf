"""`PPOConfig`: what it adds, what it refuses, and that both are written down."""

from __future__ import annotations

import ast
import dataclasses
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

import spec_rollout.training.ppo.trainer as ppo_module
from spec_rollout.training import PPOConfig, SpecGRPOConfig
from spec_rollout.training.launch import load_reward_funcs, parse
from spec_rollout.training.ppo.advantages import one_rank
from spec_rollout.training.ppo.config import REFUSED
from spec_rollout.training.ppo.metrics import rollout_metrics

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")
ADDED = {option.name for option in fields(PPOConfig)} - {option.name for option in fields(SpecGRPOConfig)}
CPU = {"bf16": False, "use_cpu": True}
OTHER = {
    "beta": 0.04,
    "loss_type": "grpo",
    "delta": 2.0,
    "importance_sampling_level": "sequence",
    "scale_rewards": False,
    "multi_objective_aggregation": "normalize_then_sum",
    "off_policy_mask_threshold": 0.5,
    "use_bias_correction_kl": False,
    "use_adaptive_entropy": True,
    "importance_sampling_correction": True,
    "sync_ref_model": True,
    "ref_model_sync_steps": 3,
}


def make(**options) -> PPOConfig:
    return PPOConfig("out", **(CPU | options))


@pytest.mark.parametrize("name", REFUSED)
def test_options_of_grpo_are_refused_by_name(name):
    assert name in {option.name for option in fields(SpecGRPOConfig)}
    value = OTHER.get(name, 0.77)
    with pytest.raises(ValueError, match=f"^{name}=.* is an option of GRPO, not of PPO: "):
        make(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 0}, "num_generations=0 .*at least 1"),
        ({"num_iterations": 0}, "num_iterations=0 .*at least 1"),
        ({"epsilon": 1.5}, "epsilon=1.5 "),
        ({"epsilon_high": 0.0}, "epsilon_high=0.0 "),
        ({"value_learning_rate": 0.0}, "value_learning_rate=0.0 .*None for learning_rate"),
        ({"vf_coef": 0.0}, "vf_coef=0.0 "),
        ({"cliprange_value": -1.0}, "cliprange_value=-1.0 "),
        ({"gamma": 0.0}, "gamma=0.0 "),
        ({"gamma": 1.1}, "gamma=1.1 "),
        ({"lam": -0.1}, "lam=-0.1 "),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty=-1.0 "),
        ({"kl_coef": -0.1}, "kl_coef=-0.1 "),
        ({"kl_target": 0.0}, "kl_target=0.0 "),
        ({"kl_target": 1.0, "kl_coef": 0.0}, "kl_target=1.0 .*initial kl_coef above 0"),
        ({"kl_horizon": 7}, "kl_horizon=7 .*generation_batch_size=8"),
        ({"missing_eos_penalty": 1.0, "mask_truncated_completions": True}, "exclude each other"),
        ({"use_vllm": True}, "use_vllm=True .*use_vllm=False"),
        ({"per_device_train_batch_size": 1}, "1 completion .*per_device_train_batch_size"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("options", "steps", "batch"),
    [
        ({"per_device_train_batch_size": 3}, 1, 3),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}, 3, 3),
        ({"per_device_train_batch_size": 1, "steps_per_generation": 5}, 5, 5),
        ({"per_device_train_batch_size": 2, "generation_batch_size": 6}, 3, 6),
        ({"per_device_train_batch_size": 4, "num_generations": 2, "eval_strategy": "steps", "eval_steps": 1}, 1, 4),
        ({"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 5}, 1, 8),
    ],
)
def test_a_prompt_may_have_a_single_completion(options, steps, batch):
    args = make(**options)
    assert (args.steps_per_generation, args.generation_batch_size) == (steps, batch)
    assert args.num_generations == options.get("num_generations", 1) and args.num_generations_eval is None


def test_a_single_completion_per_rank_needs_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    args = PPOConfig.__new__(PPOConfig)
    vars(args).update({option.name: option.default for option in fields(PPOConfig)}, per_device_train_batch_size=1)
    args._pass_as_groups()
    assert args.num_generations == 4


def test_groups_have_to_be_whole():
    with pytest.raises(ValueError, match="divisible by num_generations"):
        make(per_device_train_batch_size=4, num_generations=3)


def test_a_configuration_can_be_copied():
    args = dataclasses.replace(make(kl_coef=0.2, per_device_train_batch_size=4), steps_per_generation=None)
    assert (args.beta, args.kl_coef, args.num_generations) == (0.2, 0.2, 1)


def test_the_recipe_is_valid_and_opens_with_its_command():
    recipe = ROOT / "recipes" / "arithmetic_ppo.yaml"
    first = recipe.read_text().splitlines()[0]
    assert first == f"# accelerate launch trainers/ppo.py --config recipes/{recipe.name}"
    line = ["--config", str(recipe), "--use_cpu", "--kl_target", "3", "--kl_coef", "0.1"]
    script, training, _ = parse(PPOConfig, line)
    assert training.kl_target == 3.0
    assert training.lam == yaml.safe_load(recipe.read_text())["lam"]
    assert load_reward_funcs(script)


def logged_names() -> set[str]:
    """Of the figures of a generation, and of those that the trainer's source appends: keys of its dictionaries."""
    x = torch.ones(2, 3)
    names = set(rollout_metrics(x, x, x, x, x, x, one_rank))
    for node in ast.walk(ast.parse(Path(ppo_module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "tokens":
            names |= {ast.literal_eval(key) for key in node.value.keys}
    return names | {"kl_coef"}


@pytest.mark.parametrize("name", sorted(ADDED | {"num_generations", "num_iterations", "epsilon", "entropy_coef"}))
def test_every_option_is_documented(name):
    assert f"`{name}`" in DOCS
    option = next(option for option in fields(PPOConfig) if option.name == name)
    assert option.metadata["help"]
    assert name not in ADDED or re.search(rf"^ +{name} \(", PPOConfig.__doc__, re.MULTILINE)


def test_every_metric_is_documented():
    assert {"kl", "explained_variance", "policy_loss", "clip_fraction"} <= logged_names()
    assert [name for name in sorted(logged_names()) if f"| `{name}` |" not in DOCS] == []
