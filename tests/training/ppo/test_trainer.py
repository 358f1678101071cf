"""`PPOTrainer`: it learns, speculation changes nothing, and TRL's options keep working."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from spec_rollout.training.ppo.value_head import TOKENS
from tests.training.test_grpo import assert_same, trained, weights

LORA = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)}
VARIATIONS = {
    "head": {},
    "adaptive": {"kl_target": 0.5, "kl_horizon": 20, "num_generations": 2},
    "accumulation": {"gradient_accumulation_steps": 2, "steps_per_generation": 2, "max_steps": 4},
    "critic": {"value_model": "policy"},
    "processed": {"temperature": 0.7, "top_k": 9, "kl_coef": 0.0, "gamma": 0.9, "lam": 0.8, "entropy_coef": 0.01},
    "lora": {"arguments": LORA},
}


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.fixture
def variation(request, tmp_path) -> dict:
    options = VARIATIONS[request.param]
    return options | ({"value_model": str(tmp_path / "policy")} if "value_model" in options else {})


@pytest.mark.parametrize("variation", VARIATIONS, indirect=True)
def test_speculation_leaves_training_as_it_is(make_ppo, peeking, variation):
    plain = trained(make_ppo(num_speculative_tokens=0, **variation))
    speculative = trained(make_ppo(num_speculative_tokens=3, **variation))
    assert_same(plain, speculative)
    assert all(length > 2 for length in logged(speculative, "speculative/mean_acceptance_length"))
    differences = logged(speculative, "sampling/sampling_logp_difference/max")
    assert differences and (max(differences) < 1e-4 or "top_k" in variation)
    assert any(weight.any() for name, weight in weights(plain).items() if "value_function" in name)


def test_a_learning_head_leaves_training_as_it_is(make_ppo, eager_head):
    longer = {"max_steps": 16}
    plain = trained(make_ppo(num_speculative_tokens=0, **longer))
    speculative = trained(make_ppo(num_speculative_tokens=2, **longer))
    assert_same(plain, speculative)
    assert speculative.sampler.backend.draft_version >= 1
    assert max(logged(speculative, "speculative/mean_acceptance_length")) > 1


def kind(text: str) -> str:
    return "digit" if text.isdigit() else "letter"


def same_kind(prompts, completions, **kwargs) -> list[float]:
    """A bandit with contexts: 1 for a digit after a digit and for a letter after a letter."""
    return [float(kind(prompt) == kind(taken)) for prompt, taken in zip(prompts, completions, strict=True)]


def digits_win(prompts, **kwargs) -> list[float]:
    """What is to come shows in the prompt."""
    return [float(kind(prompt) == "digit") for prompt in prompts]


CONTEXTS = {"arguments": {"train_dataset": Dataset.from_dict({"prompt": list("abcd1234") * 8})}}


@pytest.mark.parametrize("critic", [False, True])
def test_it_solves_a_bandit(make_ppo, peeking, tmp_path, critic):
    trainer = make_ppo(
        max_completion_length=1,
        per_device_train_batch_size=16,
        max_steps=80,
        learning_rate=3e-3,
        kl_coef=0.0,
        num_speculative_tokens=0,
        value_model=str(tmp_path / "policy") if critic else None,
        **CONTEXTS,
    )
    trainer.reward_funcs = [same_kind]
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[:3]) / 3 < 0.7
    assert sum(rewards[-5:]) / 5 > 0.9


@pytest.mark.parametrize("critic", [False, True])
def test_the_value_function_learns_what_is_to_come(make_ppo, peeking, tmp_path, critic):
    options = {"value_model": str(tmp_path / "policy")} if critic else {}
    trainer = make_ppo(max_steps=48, max_completion_length=1, learning_rate=1e-4, kl_coef=0.0, **options, **CONTEXTS)
    trainer.reward_funcs = [digits_win]
    trainer.train()
    explained = logged(trainer, "explained_variance")
    assert explained[0] == pytest.approx(0.0, abs=1e-6)  # it starts at 0 everywhere
    assert sum(explained[-3:]) / 3 > 0.6


def test_one_forward_pass_agrees_with_the_policy_and_the_head(make_ppo, peeking):
    trainer = make_ppo()
    with torch.no_grad():
        trainer.value_function.weight.normal_()
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [4, 5, 6, 7, 8, 1]])
    mask = (ids != 0).long()
    batch = dict(zip(TOKENS, (ids[:, :3], mask[:, :3], ids[:, 3:], mask[:, 3:]), strict=True))
    given, entropies, read, _ = trainer._forward(trainer.model, batch)
    plain = trainer.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    hidden = plain.hidden_states[-1][:, 2:-1]
    values = hidden @ trainer.value_function.weight[0] + trainer.value_function.bias
    logprobs = plain.logits.log_softmax(-1)[:, 2:-1]
    torch.testing.assert_close(read, values)
    torch.testing.assert_close(given, logprobs.gather(2, ids[:, 3:, None])[..., 0])
    torch.testing.assert_close(entropies, -(logprobs.exp() * logprobs).sum(-1))


def test_the_first_update_is_on_policy_and_counts_every_token_alike(make_ppo, peeking, monkeypatch):
    """With ρ = 1 the policy loss of a generation is minus its mean advantage over tokens, however it is split."""
    batches = []
    kept = type(make_ppo())._compute_loss

    def spy(self, model, inputs):
        loss = kept(self, model, inputs)
        batches.append((inputs, loss.item()))
        return loss

    trainer = make_ppo(learning_rate=1e-30, value_learning_rate=1e-30, whiten_advantages=False, max_steps=2)
    monkeypatch.setattr(type(trainer), "_compute_loss", spy)
    trainer.train()
    total = torch.cat([inputs["loss_mask"].flatten() for inputs, _ in batches]).sum()
    advantages = sum((inputs["advantages"] * inputs["loss_mask"]).sum() for inputs, _ in batches) / total
    values = sum((inputs["returns"].square() * inputs["loss_mask"]).sum() for inputs, _ in batches) / total / 2
    mean = sum(loss for _, loss in batches) / 2
    assert mean == pytest.approx((-advantages + 0.1 * values).item(), rel=1e-4)
    assert logged(trainer, "approx_kl") == pytest.approx([0, 0], abs=1e-6)
    assert logged(trainer, "clip_fraction") == [0, 0]


def test_learning_rates_of_their_own(make_ppo, peeking):
    trainer = make_ppo(value_learning_rate=0.5, learning_rate=0.25)
    trainer.create_optimizer()
    own = {id(weight) for weight in trainer.value_function.parameters()}
    rates = {id(w): group["lr"] for group in trainer.optimizer.param_groups for w in group["params"]}
    assert len(rates) == len(list(trainer.model.parameters()))
    assert all(rate == (0.5 if key in own else 0.25) for key, rate in rates.items())


def test_the_table_of_completions_shows_advantages_of_ppo(make_ppo, peeking, prompts):
    trainer = make_ppo(max_steps=1, whiten_advantages=False)
    batches = []
    kept = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append(kept(inputs)) or batches[-1]
    trainer.train()
    (batch,) = batches
    means = (batch["advantages"] * batch["loss_mask"]).sum(1) / batch["loss_mask"].sum(1)
    assert list(trainer._logs["advantages"]) == pytest.approx(means.tolist())
    assert trainer._logs["completion"] and "frac_reward_zero_std" not in trainer.state.log_history[0]
