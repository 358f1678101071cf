"""RLOO, PPO and adapters on a server with one trainer process."""

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForCausalLM

from spec_rollout.training import (
    PPOConfig,
    PPOTrainer,
    SpecGRPOConfig,
    SpecGRPOTrainer,
    SpecRLOOConfig,
    SpecRLOOTrainer,
)
from tests.backends.vllm.process import Process
from tests.backends.vllm.tiny import SIZES, needs_vllm, save_policy
from tests.training.conftest import OPTIONS, PROMPTS, Digits, build_tokenizer

pytestmark = needs_vllm
STEPS = 4
OWN = {"max_steps": STEPS, "max_completion_length": 24, "learning_rate": 1e-3, "gradient_checkpointing": False}
PPO = {"num_generations": 1, "num_iterations": 1, "kl_coef": 0.0}
KINDS = {
    "rloo": (SpecRLOOTrainer, SpecRLOOConfig, {}, None),
    "ppo": (PPOTrainer, PPOConfig, PPO, None),
    "lora": (SpecGRPOTrainer, SpecGRPOConfig, {}, {"target_modules": ["q_proj", "down_proj"]}),
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("policy"), build_tokenizer()
    save_policy(folder, "llama", **SIZES | {"vocab_size": len(tokenizer)})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(policy, tmp_path_factory):
    """How a trainer is told of the server."""
    process = Process(policy, tmp_path_factory.mktemp("server") / "log", "--num_speculative_tokens", "2")
    yield {"rollout_backend": "vllm", "vllm_mode": "server", "vllm_server_base_url": process.url}
    process.kill()


def trained(kind, policy, folder, options):
    trainer_class, config, own, adapter = KINDS[kind]
    args = config(str(folder), **OPTIONS | OWN | own | options)
    rows, model = Dataset.from_dict({"prompt": PROMPTS}), LlamaForCausalLM.from_pretrained(policy)
    lora = LoraConfig(r=4, init_lora_weights=False, **adapter) if adapter else None
    trainer = trainer_class(model, Digits(), args, rows, processing_class=build_tokenizer(), peft_config=lora)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_it_would_without_guesses(kind, policy, served, tmp_path, monkeypatch):
    monkeypatch.setattr("spec_rollout.draft.budget.RefreshBudget.seconds", lambda self, *_: 1e9)
    monkeypatch.setattr("spec_rollout.draft.refresh.MAX_EPOCHS", 8)
    monkeypatch.setattr("spec_rollout.draft.watchman.WATCHED", 10**9)
    trainer = trained(kind, policy, tmp_path / "served", served | {"num_speculative_tokens": 2})
    plain = trained(kind, policy, tmp_path / "plain", {"num_speculative_tokens": 0})
    assert trainer.reward_funcs[0].seen == plain.reward_funcs[0].seen and len(trainer.reward_funcs[0].seen) == STEPS
    log = [entry for entry in trainer.state.log_history if "speculative/goodput" in entry]
    assert [entry["speculative/draft_version"] for entry in log] == [1, 2, 3, 4]
    assert all(entry["sampling/sampling_logp_difference/max"] < 1e-3 for entry in log)
    assert all(entry["speculative/draft_healthy"] == 1 for entry in log)
    assert max(entry["speculative/mean_acceptance_length"] for entry in log) > 1.05
