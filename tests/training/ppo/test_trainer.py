"""`PPOTrainer`: it learns, speculation changes nothing, and TRL's options keep working."""

from __future__ import annotations

import inspect
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification

from spec_rollout.training.ppo.refusals import refuse_launch
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


def test_learning_rates_of_their_own(make_ppo, peeking):
    trainer = make_ppo(value_learning_rate=0.5, learning_rate=0.25)
    trainer.create_optimizer()
    own = {id(weight) for weight in trainer.value_function.parameters()}
    rates = {id(w): group["lr"] for group in trainer.optimizer.param_groups for w in group["params"]}
    assert len(rates) == len(list(trainer.model.parameters()))
    assert all(rate == (0.5 if key in own else 0.25) for key, rate in rates.items())


def test_a_critic_comes_from_a_model_or_a_folder_and_has_to_fit(make_ppo, make_policy, peeking, tmp_path):
    def classifier(labels=1, **options):
        config = make_policy().config
        config.update({"num_labels": labels} | options)
        return AutoModelForSequenceClassification.from_config(config)

    fit = classifier()
    assert make_ppo(arguments={"value_model": fit}).value_function.model is fit
    with pytest.raises(ValueError, match=r"`score` head of 2 labels.*num_labels=1"):
        make_ppo(arguments={"value_model": classifier(2)})
    with pytest.raises(ValueError, match="no `score` head"):
        make_ppo(arguments={"value_model": make_policy()})
    with pytest.raises(ValueError, match="vocabulary of 7 tokens, the policy one of 40"):
        make_ppo(arguments={"value_model": classifier(vocab_size=7, pad_token_id=0, eos_token_id=1)})
    with pytest.raises(ValueError, match=r"given twice.*args.value_model='x'"):
        make_ppo(value_model="x", arguments={"value_model": fit})


def test_what_the_trainer_cannot_be_given(make_trainer, make_ppo, peeking):
    from spec_rollout.training import PPOTrainer, SpecGRPOConfig

    with pytest.raises(ValueError, match="SpecGRPOConfig: PPOTrainer needs a PPOConfig"):
        make_trainer(PPOTrainer, SpecGRPOConfig)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with pytest.raises(ValueError, match=r"optimizers holds an optimiser.*value_learning_rate"):
        make_ppo(arguments={"optimizers": (optimizer, None)})


def test_nothing_of_the_base_classes_is_overridden_by_accident():
    from spec_rollout.training import PPOTrainer, SpecGRPOTrainer

    meant = {
        "__init__", "_calculate_rewards", "_compute_loss", "_generate_and_score_completions", "_load_best_model",
        "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_save", "_save_checkpoint", "create_optimizer",
    }  # fmt: skip
    own = {name for name, member in vars(PPOTrainer).items() if callable(member)}
    assert {name for name in own if hasattr(SpecGRPOTrainer, name)} == meant
    for name in meant - {"__init__"}:
        ours, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (PPOTrainer, SpecGRPOTrainer))
        assert ours.keys() == theirs.keys()


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


@pytest.mark.parametrize(
    ("zero3", "fsdp", "critic", "message"),
    [
        (True, False, True, "value_model cannot be partitioned by DeepSpeed ZeRO-3: .*value_model=None"),
        (False, True, False, "cannot be run with FSDP: .*ZeRO"),
        (True, False, False, None),
        (False, False, True, None),
    ],
)
def test_what_cannot_be_sharded_is_refused(zero3, fsdp, critic, message):
    dist = SimpleNamespace(is_zero3=zero3)
    run = SimpleNamespace(_dist=dist, is_fsdp_enabled=fsdp, optimizer=None, model=torch.nn.Linear(1, 1))
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        refuse_launch(run, critic)


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
