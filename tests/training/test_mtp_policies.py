"""GRPO on a policy with an MTP head: the same completions and weights, a draft from the first rollout, none lost."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from spec_rollout.draft.mtp import MtpHead
from spec_rollout.draft.mtp_checkpoint import FILE, add_to_policy
from tests.draft.test_mtp import random_head
from tests.draft.test_mtp_names import HEADS
from tests.tiny_configs import FURTHER, HYBRIDS, SIZES
from tests.training.test_grpo import assert_same, trained


@pytest.fixture
def family() -> str:
    return "qwen3_5_text"


@pytest.fixture
def checkpoint(family, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    options = {**SIZES, "max_position_embeddings": 128, **(HYBRIDS | FURTHER)[family], **ids}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, initializer_range=0.2, **options))
    model.save_pretrained(folder)
    add_to_policy(folder, random_head(model, HEADS[family]).on_disk(torch.float32))
    return folder


@pytest.fixture
def make_policy(checkpoint):
    return lambda: AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_next", "glm4_moe", "deepseek_v3"])
def test_the_head_of_the_checkpoint_guesses_learns_and_is_kept(make_trainer, eager_head, checkpoint, family, tmp_path):
    plain = trained(make_trainer(num_speculative_tokens=0))
    options = {"draft_ngrams": False, "save_strategy": "steps", "save_steps": 3}
    speculative = trained(make_trainer(num_speculative_tokens=2, **options))
    assert_same(plain, speculative)
    logged = [entry for entry in speculative.state.log_history if "speculative/acceptance_rate" in entry]
    assert len(logged) == 3 and logged[0]["speculative/num_speculative_tokens"] == 2  # no cold start
    assert speculative.sampler.backend.draft_version == 3
    speculative.save_model(str(tmp_path / "final"))
    own, first = load_file(tmp_path / "final" / FILE), load_file(checkpoint / FILE)
    assert own.keys() == first.keys() and any(not torch.equal(own[name], first[name]) for name in own)
    kept = load_file(tmp_path / "run" / "checkpoint-3" / FILE)
    assert kept.keys() == own.keys() and all(torch.equal(kept[name], own[name]) for name in own)


def test_a_resumed_run_goes_on_with_it(make_trainer, eager_head, tmp_path):
    first = trained(make_trainer(num_speculative_tokens=2, max_steps=2, save_strategy="steps", save_steps=2))
    second = make_trainer(num_speculative_tokens=2, max_steps=3)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    learner = second.sampler.backend.learner
    assert isinstance(learner.head, MtpHead) and learner.version == first.sampler.backend.draft_version + 1


@pytest.mark.parametrize("family", ["qwen3_next", "glm4_moe"])
def test_a_resumed_run_takes_up_experts_which_a_checkpoint_holds_one_by_one(make_trainer, checkpoint, tmp_path):
    options = {"num_speculative_tokens": 0, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, saved = trained(make_trainer(**options)), tmp_path / "run" / "checkpoint-2"
    resumed = trained(make_trainer(**options), resume_from_checkpoint=str(saved))
    whole.reward_funcs[0].seen = whole.reward_funcs[0].seen[2:]
    assert_same(whole, resumed)
    resumed.state.best_model_checkpoint = str(saved)
    resumed._load_best_model()
    best = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).state_dict()
    assert all(torch.equal(weight, best[name]) for name, weight in resumed.model.state_dict().items())
    assert any(not torch.equal(weight, best[name]) for name, weight in whole.model.state_dict().items())


def test_ppo_keeps_it_beside_the_policy_and_its_value_function(make_ppo, eager_head, checkpoint, tmp_path):
    add_to_policy(tmp_path / "policy", load_file(checkpoint / FILE))
    options = {"draft_ngrams": False, "save_strategy": "steps", "save_steps": 4}
    trainer = trained(make_ppo(num_speculative_tokens=2, **options))
    assert isinstance(trainer.sampler.backend.learner.head, MtpHead) and trainer.sampler.backend.draft_version > 0
    for folder in (tmp_path / "run" / "checkpoint-4", tmp_path / "run" / "checkpoint-8"):
        assert {FILE, "value_head.safetensors"} <= {path.name for path in folder.iterdir()}
    trainer.save_model(str(tmp_path / "final"))
    own, first = load_file(tmp_path / "final" / FILE), load_file(checkpoint / FILE)
    assert own.keys() == first.keys() and not torch.equal(own["mtp.fc.weight"], first["mtp.fc.weight"])
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(found.values())
