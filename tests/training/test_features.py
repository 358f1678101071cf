"""What TRL's trainers offer above sampling keeps working: rewards, logging of completions, checkpointing, the card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer, SpecRLOOConfig, SpecRLOOTrainer
from spec_rollout.training.model_card import section
from tests.training.test_grpo import assert_same, trained

BOTH = [(SpecGRPOTrainer, SpecGRPOConfig), (SpecRLOOTrainer, SpecRLOOConfig)]


async def brevity(completion_ids, **given) -> list[float]:
    return [-float(len(ids)) for ids in completion_ids]


def sometimes(completion_ids, **given) -> list[float | None]:
    return [None if i % 2 else 1.0 for i in range(len(completion_ids))]


@pytest.mark.parametrize(("trainer_class", "config_class"), BOTH)
def test_several_rewards_one_of_them_asynchronous(make_trainer, peeking, trainer_class, config_class):
    trainers = []
    for gamma in (0, 3):
        trainer = make_trainer(
            trainer_class, config_class, num_speculative_tokens=gamma, reward_weights=[1.0, 0.1, 1.0],
            arguments={"more_rewards": [brevity, sometimes]},
        )  # fmt: skip
        trainers.append(trained(trainer))
    assert_same(*trainers)
    logged = trainers[1].state.log_history[0]
    assert logged["rewards/brevity/mean"] < 0 and logged["rewards/sometimes/mean"] == 1.0
    assert logged["speculative/mean_acceptance_length"] > 2


@pytest.mark.parametrize(("trainer_class", "config_class"), BOTH)
def test_completions_are_logged(make_trainer, peeking, capsys, trainer_class, config_class):
    trained(make_trainer(trainer_class, config_class, log_completions=True, num_completions_to_print=1))
    assert "Completion" in capsys.readouterr().out


@pytest.mark.parametrize(("trainer_class", "config_class"), BOTH)
def test_gradient_checkpointing(make_trainer, peeking, trainer_class, config_class):
    kept = trained(make_trainer(trainer_class, config_class, gradient_checkpointing=True))
    assert kept.model.is_gradient_checkpointing
    plain = trained(make_trainer(trainer_class, config_class, num_speculative_tokens=0, gradient_checkpointing=True))
    assert_same(kept, plain)
    assert kept.state.log_history[0]["speculative/mean_acceptance_length"] > 2


def test_a_repeated_generation_phase_draws_afresh(make_trainer, peeking):
    trainer = trained(make_trainer(steps_per_generation=1, gradient_accumulation_steps=4, max_steps=1))
    assert len(set(map(str, trainer.reward_funcs[0].seen))) == 4


def test_the_card_names_drafter_and_versions(make_trainer, peeking):
    trainer = trained(make_trainer(save_strategy="steps", save_steps=3))
    card = Path(trainer.args.output_dir, "README.md")
    text = card.read_text(encoding="utf-8")
    assert "EAGLE-3 head that started from random weights" in text and "3 versions so far" in text
    assert "`num_speculative_tokens`): 2" in text and "spec-rollout" in text and "Framework versions" in text
    trainer.create_model_card()
    assert card.read_text(encoding="utf-8").count("## Speculative rollouts") == 1


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (SpecConfig(num_speculative_tokens=0), ["Drafter: none", "training: none", "`num_speculative_tokens`): 0"]),
        (SpecConfig(draft_model_path="heads/a"), ["started from `heads/a`", "adapted, at most 7"]),
        (SpecConfig(draft_refresh=False, draft_model_path="head"), ["Draft training: none"]),
    ],
)
def test_the_card_says_what_ran(config, found):
    assert all(words in section(config, 0) for words in found)


def test_torch_draws_the_same_with_and_without_speculation(make_trainer, peeking):
    draws = []
    for gamma in (0, 3):
        trained(make_trainer(num_speculative_tokens=gamma))
        draws.append(torch.rand(3))
    assert torch.equal(*draws)
