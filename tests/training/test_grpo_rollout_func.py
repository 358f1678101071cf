"""`make_rollout_func` in TRL's own trainer."""

from __future__ import annotations

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from spec_rollout.config import SpecConfig
from spec_rollout.training import make_rollout_func
from tests.training.test_grpo import assert_same, trained


def with_rollout_func(make_trainer, gamma, **options):
    rollout_func = make_rollout_func(SpecConfig(num_speculative_tokens=gamma))
    arguments = {"rollout_func": rollout_func} | options.pop("arguments", {})
    return make_trainer(GRPOTrainer, GRPOConfig, arguments=arguments, **options), rollout_func


def test_it_learns_what_the_trainer_class_learns(make_trainer, peeking):
    hooked, rollout_func = with_rollout_func(make_trainer, 3)
    trained(hooked)
    assert_same(hooked, trained(make_trainer(num_speculative_tokens=0)))
    assert hooked.state.log_history[0]["speculative/mean_acceptance_length"] > 2
    assert rollout_func.sampler.backend.draft_version == 3


def test_it_serves_conversations_and_evaluation(make_trainer, peeking, prompts):
    chats = prompts.select(range(4)).map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    arguments = {"train_dataset": chats, "eval_dataset": chats}
    hooked, rollout_func = with_rollout_func(make_trainer, 2, arguments=arguments)
    trained(hooked)
    logged = hooked.evaluate()
    assert logged["eval_speculative/acceptance_rate"] == 1.0
    assert rollout_func.sampler.backend.collected[-1] is False


def test_it_refuses_what_the_trainer_class_refuses(make_trainer, peeking):
    hooked, _ = with_rollout_func(make_trainer, 2, generation_kwargs={"no_repeat_ngram_size": 2})
    with pytest.raises(ValueError, match="no_repeat_ngram_size=2"):
        hooked.train()


def test_it_takes_a_configuration_of_the_sampler(tmp_path):
    with pytest.raises(ValueError, match="config is a GRPOConfig: give a SpecConfig"):
        make_rollout_func(GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_a_trainer_of_ours_gives_way_to_a_rollout_func(make_trainer, peeking):
    def rollout_func(prompts, trainer):
        ids = trainer._tokenize_prompts(prompts)[0]
        return {"prompt_ids": ids, "completion_ids": [[5, 6, 1]] * len(ids), "logprobs": None}

    trainer = make_trainer(arguments={"rollout_func": rollout_func})
    trainer.train()
    assert trainer.sampler.backend is None
    assert "speculative/goodput" not in trainer.state.log_history[0]
    assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())
