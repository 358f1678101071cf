"""GRPO with vLLM as the engine, on policies that bring an MTP head: it guesses, learns and is saved."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spec_rollout.draft import refresh
from spec_rollout.draft.budget import RefreshBudget
from spec_rollout.draft.mtp_checkpoint import FILE, add_to_policy
from spec_rollout.draft.mtp_names import QWEN, appended
from tests.backends.vllm.process import Process
from tests.backends.vllm.test_mtp import FAMILIES, text_only  # noqa: F401
from tests.backends.vllm.tiny import SIZES, needs_vllm
from tests.draft.test_mtp import random_head
from tests.tiny import make_policy
from tests.training.conftest import OPTIONS, PROMPTS, Digits, build_tokenizer

pytestmark = [needs_vllm, pytest.mark.usefixtures("text_only")]
GUESSES = 2


def make_checkpoint(family: str, folder: Path) -> None:
    tokenizer = build_tokenizer()
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    model = make_policy(family, std=0.3, **{**SIZES, **FAMILIES[family].shape, **ids})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    names = QWEN if "qwen" in family else appended(SIZES["num_hidden_layers"])
    add_to_policy(folder, random_head(model, names).on_disk(torch.float32))


def train(family: str, folder: Path, options: dict) -> list[dict]:
    """Three steps; the figures of each."""
    from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer

    RefreshBudget.seconds, refresh.MAX_EPOCHS = lambda self, *_: 1.0, 20
    own = {"bf16": FAMILIES[family].dtype == "bfloat16", "learning_rate": 1e-3, "max_completion_length": 24}
    given = OPTIONS | own | {"max_slots": 16} | options
    args = SpecGRPOConfig(str(folder / "run"), rollout_backend="vllm", **given)
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    dataset = Dataset.from_dict({"prompt": [text for text in PROMPTS if len(text) > 1]})  # one token is refused
    trainer = SpecGRPOTrainer(policy, [Digits()], args, train_dataset=dataset, processing_class=build_tokenizer())
    trainer.train()
    trainer.save_model(str(folder / "final"))
    return [entry for entry in trainer.state.log_history if "speculative/goodput" in entry]


def check(family: str, folder: Path, logged: list[dict]) -> None:
    assert [entry["speculative/draft_version"] for entry in logged] == [1, 2, 3]
    assert all(entry["speculative/draft_healthy"] == 1 for entry in logged)
    assert all(entry["speculative/acceptance_rate"] > 0 for entry in logged)  # no cold start
    bound = 1e-3 if FAMILIES[family].dtype == "float32" else 0.7  # of rounding; a lost state makes 9
    assert all(entry["sampling/sampling_logp_difference/max"] < bound for entry in logged)
    own, first = load_file(folder / "final" / FILE), load_file(folder / "policy" / FILE)
    assert own.keys() == first.keys() and any(not torch.equal(own[name], first[name]) for name in own)


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_5_text"])
def test_in_the_trainers_process(family, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    make_checkpoint(family, tmp_path / "policy")
    given = {"num_speculative_tokens": GUESSES} if family == "glm4_moe" else {}
    with ProcessPoolExecutor(1, get_context("spawn")) as apart:
        logged = apart.submit(train, family, tmp_path, given).result()
    check(family, tmp_path, logged)


def test_on_a_server(tmp_path):
    make_checkpoint("qwen3_5_text", tmp_path / "policy")
    line = f"--dtype bfloat16 --num_speculative_tokens {GUESSES}"
    process = Process(tmp_path / "policy", tmp_path / "log", *line.split())
    options = {"vllm_mode": "server", "vllm_server_base_url": process.url, "num_speculative_tokens": GUESSES}
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as apart:
            logged = apart.submit(train, "qwen3_5_text", tmp_path, options).result()
    finally:
        process.kill()
    check("qwen3_5_text", tmp_path, logged)
