"""Asynchronous GRPO end to end: a server, a process that rolls out, and a trainer that pushes meanwhile."""

import json
import queue
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from tests.backends.vllm.process import Process
from tests.backends.vllm.tiny import SIZES, needs_vllm, save_policy
from tests.training.conftest import PROMPTS, build_tokenizer

pytest.importorskip("trl.experimental.async_grpo")

from spec_rollout.training import SpecAsyncGRPOConfig, SpecAsyncGRPOTrainer

OPTIONS = {
    "bf16": False,
    "use_cpu": True,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 40,
    "learning_rate": 1e-3,
    "max_steps": 6,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "token_budget": 0,
    "gradient_checkpointing": False,
    "num_speculative_tokens": 3,
    "vllm_server_timeout": 120.0,
    "max_slots": 16,
}


def digits(completion_ids, **given) -> list[float]:
    """In a process of its own, so at the top of a module."""
    return [sum(token >= 29 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The policy's folder and its server."""
    folder = tmp_path_factory.mktemp("async")
    tokenizer = build_tokenizer()
    save_policy(folder / "policy", "llama", **SIZES | {"vocab_size": len(tokenizer), "num_hidden_layers": 4})
    tokenizer.save_pretrained(folder / "policy")
    process = Process(folder / "policy", folder / "log")
    yield folder / "policy", process
    process.kill()


def make_trainer(policy: Path, url: str, out: Path, **options) -> SpecAsyncGRPOTrainer:
    args = SpecAsyncGRPOConfig(str(out), vllm_server_base_url=url, **OPTIONS | options)
    rows = Dataset.from_dict({"prompt": PROMPTS})
    return SpecAsyncGRPOTrainer(str(policy), digits, args, train_dataset=rows)


@needs_vllm
def test_it_runs(served, tmp_path, eager_head):
    policy, process = served
    trainer = make_trainer(policy, process.url, tmp_path / "run")
    trainer.train()
    print(json.dumps(trainer.state.log_history, indent=1))
    assert trainer.state.global_step == 6
