"""From the recipe to a trained policy and value function, by command and by script."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from spec_rollout import cli

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("entry", ["command", "script"])
def test_the_recipe_trains_and_saves(make_policy, tokenizer, tmp_path, peeking, monkeypatch, entry):
    make_policy().save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    Dataset.from_dict({"prompt": ["a", "b c", "d"] * 8, "answer": [1, 2, 3] * 8}).to_json(tmp_path / "data.jsonl")
    quick = {
        "dataset_name": str(tmp_path / "data.jsonl"),
        "model_name_or_path": str(tmp_path / "policy"),
        "output_dir": str(tmp_path / "out"),
        "use_cpu": "true",
        "per_device_train_batch_size": "2",
        "max_completion_length": "4",
        "max_steps": "2",
        "kl_coef": "0.1",  # the reference comes from the policy's folder
        "disable_tqdm": "true",
    }
    line = ["--config", str(ROOT / "recipes" / "arithmetic_ppo.yaml")]
    line += [word for name, value in quick.items() for word in (f"--{name}", value)]
    if entry == "command":
        assert cli.main(["ppo", *line]) == 0
    else:
        monkeypatch.setattr(sys, "argv", ["ppo.py", *line])
        runpy.run_path(str(ROOT / "trainers" / "ppo.py"), run_name="__main__")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "value_head.safetensors").is_file()
