"""What a completion's score comes to: rewards, the penalty of the reference, and what has no score."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.training.ppo.test_trainer import logged
from tests.training.test_grpo import trained, weights


def test_the_penalty_is_the_divergence_from_the_reference(make_ppo, peeking, monkeypatch):
    trainer = make_ppo(kl_coef=0.3, max_steps=16, learning_rate=3e-2)
    seen = []
    kept = type(trainer)._generate_and_score_completions

    def spy(self, inputs):
        batch = kept(self, inputs)
        seen.append(batch)
        return batch

    monkeypatch.setattr(type(trainer), "_generate_and_score_completions", spy)
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-4) and kl[-1] > 0.05
    assert logged(trainer, "kl_coef") == [0.3] * len(kl)
    rewards, penalized = logged(trainer, "reward"), logged(trainer, "penalized_reward")
    assert penalized == pytest.approx([reward - 0.3 * k for reward, k in zip(rewards, kl, strict=True)], abs=1e-5)
    assert all("ref_per_token_logps" not in batch for batch in seen)


def test_the_coefficient_adapts_in_training_only(make_ppo, peeking, prompts):
    trainer = make_ppo(
        kl_target=100.0, kl_horizon=80, eval_strategy="steps", eval_steps=1,
        arguments={"eval_dataset": prompts.select(range(4))},
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "kl_coef") == pytest.approx([0.1, 0.1 * (1 - 0.2 * 8 / 80)])
    assert trainer.kl_controller.coef == pytest.approx(0.1 * (1 - 0.2 * 8 / 80) ** 2)
    assert logged(trainer, "eval_kl_coef") and logged(trainer, "eval_explained_variance")


def test_a_completion_that_does_not_end_is_penalised(make_ppo, peeking):
    without, penalised = make_ppo(kl_coef=0.0), make_ppo(kl_coef=0.0, missing_eos_penalty=5.0)
    for trainer in (without, penalised):
        trainer.train()
    clipped = logged(penalised, "completions/clipped_ratio")[0]
    first = [logged(trainer, "penalized_reward")[0] for trainer in (without, penalised)]
    assert clipped > 0
    assert first[0] - first[1] == pytest.approx(5.0 * clipped, abs=1e-5)


def test_completions_without_a_score_teach_nothing(make_ppo, peeking):
    trainer = make_ppo(max_steps=4)
    batches = []
    kept = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append(kept(inputs)) or batches[-1]
    trainer.reward_funcs = [lambda completions, **kwargs: [None if i % 2 else 1.0 for i in range(len(completions))]]
    trained(trainer)
    (batch,) = batches
    assert not batch["loss_mask"][1::2].any() and batch["loss_mask"][::2, 0].all()
    assert batch["num_items_in_batch"] == batch["completion_mask"][::2].sum()


def test_cut_off_completions_can_be_left_out(make_ppo, peeking):
    some, none = (make_ppo(mask_truncated_completions=True, max_completion_length=n) for n in (40, 1))
    assert 0 < logged(trained(some), "completions/clipped_ratio")[0] < 1
    before = weights(none)
    none.train()
    assert all(torch.equal(before[name], weight) for name, weight in weights(none).items())
    assert all(math.isfinite(loss) for trainer in (some, none) for loss in logged(trainer, "policy_loss"))


def test_a_reward_model(make_ppo, tokenizer, peeking, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "policy", num_labels=1).save_pretrained(
        tmp_path / "reward"
    )
    tokenizer.save_pretrained(tmp_path / "reward")
    trainer = trained(make_ppo(max_steps=4, arguments={"reward_funcs": [str(tmp_path / "reward")]}))
    assert logged(trainer, "rewards/reward/mean")[0] != 0
    reward = trainer.reward_funcs[0]
    with pytest.raises(ValueError, match="value_model is also in reward_funcs"):
        make_ppo(arguments={"reward_funcs": reward, "value_model": reward})


@pytest.mark.parametrize(("kl_coef", "passes"), [(0.0, 0), (0.1, 2)])
def test_a_generation_is_scored_once(make_ppo, peeking, monkeypatch, kl_coef, passes):
    """TRL's own pass is for the reference alone: two minibatches of it, and none where there is no reference."""
    trainer = make_ppo(kl_coef=kl_coef, max_steps=4)
    read = []
    kept = type(trainer)._get_per_token_logps_and_entropies

    def spy(self, model, ids, mask, keep, batch_size=None, **options):
        read.extend(ids.split(batch_size))
        assert model is trainer.ref_model
        return kept(self, model, ids, mask, keep, batch_size=batch_size, **options)

    monkeypatch.setattr(type(trainer), "_get_per_token_logps_and_entropies", spy)
    assert len(read) == 0 and trained(trainer).num_iterations == 2
    assert len(read) == passes
