"""`SpecGRPOTrainer`: what is learned does not depend on speculation, and TRL's options keep working."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from spec_rollout.config import SpecConfig

VARIATIONS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
    "reuse": {"steps_per_generation": 2, "num_iterations": 2},
    "processed": {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.2},
    "masked": {"mask_truncated_completions": True, "scale_rewards": "none"},
}


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def assert_same(first, second) -> None:
    """Two trained trainers saw the same completions at every step and end with the same bits."""
    assert first.reward_funcs[0].seen == second.reward_funcs[0].seen
    others = weights(second)
    assert [name for name, weight in weights(first).items() if not torch.equal(weight, others[name])] == []


def trained(trainer, **options):
    before = weights(trainer)
    trainer.train(**options)
    assert any(not torch.equal(before[name], weight) for name, weight in weights(trainer).items())
    return trainer


@pytest.mark.parametrize("variation", VARIATIONS)
def test_speculation_leaves_training_as_it_is(make_trainer, peeking, variation):
    plain = trained(make_trainer(num_speculative_tokens=0, **VARIATIONS[variation]))
    speculative = trained(make_trainer(num_speculative_tokens=3, **VARIATIONS[variation]))
    assert_same(plain, speculative)
    logged = [entry for entry in speculative.state.log_history if "speculative/acceptance_rate" in entry]
    assert logged and all(entry["speculative/mean_acceptance_length"] > 2 for entry in logged)


@pytest.mark.parametrize("gamma", [2, None])
def test_a_learning_head_leaves_training_as_it_is(make_trainer, eager_head, gamma):
    plain = trained(make_trainer(num_speculative_tokens=0))
    speculative = trained(make_trainer(num_speculative_tokens=gamma))
    assert_same(plain, speculative)
    logged = speculative.state.log_history
    assert speculative.sampler.backend.draft_version >= 1
    assert any(entry.get("speculative/draft_loss", 0) > 0 for entry in logged)
    assert gamma is None or any(entry.get("speculative/acceptance_rate", 0) > 0 for entry in logged)


@pytest.mark.parametrize("path", ["lean", "transformers"])
def test_under_trl_the_policy_decodes_by_the_lean_pass(make_trainer, peeking, path):
    """TRL lays a forward of its own around the policy's, which changes nothing of it; one of another kind might."""
    trainer = make_trainer(num_speculative_tokens=3)
    of_trl = vars(trainer.model)["forward"]
    if path == "transformers":
        trainer.model.forward = lambda *given, **options: of_trl(*given, **options)
    trained(trainer)
    assert trainer.sampler.backend.engine.target.path == path


def test_a_lora_policy(make_trainer, eager_head):
    lora = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)}
    plain = trained(make_trainer(num_speculative_tokens=0, beta=0.1, arguments=lora))
    assert_same(plain, trained(make_trainer(num_speculative_tokens=2, beta=0.1, arguments=lora)))


def test_mixed_precision(make_trainer, eager_head):
    plain = trained(make_trainer(num_speculative_tokens=0, bf16=True))
    speculative = trained(make_trainer(num_speculative_tokens=2, bf16=True))
    lengths = [[len(ids) for ids in trainer.reward_funcs[0].seen[0]] for trainer in (plain, speculative)]
    assert lengths[0] == lengths[1]  # the first rollout starts from the same weights and decodes plainly
    assert any("speculative/acceptance_rate" in entry for entry in speculative.state.log_history)


def test_conversational_prompts(make_trainer, tokenizer, peeking):
    chats = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in ("one", "two three")]})
    trainer = trained(make_trainer(arguments={"train_dataset": chats}))
    rendered = tokenizer.apply_chat_template(chats[0]["prompt"], add_generation_prompt=True, return_dict=False)
    assert trainer._tokenize_prompts(chats[:1]["prompt"])[0] == [rendered]


def test_configuration_of_trl_itself(make_trainer, peeking):
    from trl import GRPOConfig

    trainer = trained(make_trainer(config_class=GRPOConfig))
    assert trainer.sampler.config.num_speculative_tokens is None


def test_every_generation_call_has_a_seed_of_its_own(make_trainer, prompts, peeking):
    trainer = make_trainer(
        num_speculative_tokens=0,
        gradient_accumulation_steps=2,
        steps_per_generation=1,
        eval_strategy="steps",
        eval_steps=1,
        arguments={"eval_dataset": prompts.select(range(4))},
    )
    trainer.train()
    backend = trainer.sampler.backend
    train = [seed for seed, collected in zip(backend.seeds, backend.collected, strict=True) if collected]
    assert len(train) == 6 and len(backend.seeds) > 6
    assert len(set(backend.seeds)) == len(backend.seeds)
    assert {len(seed) for seed in backend.seeds} == {5}  # of one length: SeedSequence reads (1,) and (1, 0) alike


def test_ranks_and_later_steps_share_no_seed():
    from spec_rollout.training.sampler import TrainerSampler

    def seeds(rank, step):
        trainer = SimpleNamespace(
            args=SimpleNamespace(seed=7),
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(process_index=rank),
            state=SimpleNamespace(global_step=step),
        )
        sampler = TrainerSampler(SpecConfig())
        return [sampler._seed(trainer), sampler._seed(trainer)]

    every = [seed for rank in (0, 1) for step in (0, 1) for seed in seeds(rank, step)]
    assert len(set(every)) == 8
    assert seeds(1, 5) == seeds(1, 5)  # as a resumed run asks for them


def test_evaluation_neither_trains_the_draft_nor_moves_the_noise(make_trainer, prompts, peeking):
    evaluated = make_trainer(eval_strategy="steps", eval_steps=1, arguments={"eval_dataset": prompts.select(range(4))})
    evaluated.train()
    backend = evaluated.sampler.backend
    assert backend.collected.count(True) == 3 and backend.collected.count(False) > 0
    logged = [entry for entry in evaluated.state.log_history if "eval_reward" in entry]
    assert all("eval_speculative/goodput" in entry and "eval_speculative/draft_loss" not in entry for entry in logged)
    other = make_trainer()
    other.train()
    assert other.sampler.backend.seeds == [s for s, c in zip(backend.seeds, backend.collected, strict=True) if c]


def test_one_backend_for_the_whole_run(make_trainer, peeking):
    made = peeking.made
    trainer = make_trainer()
    assert trainer.sampler.backend is None
    trained(trainer)
    assert peeking.made == made + 1


def test_log_probs_are_handed_over_and_change_nothing(make_trainer, peeking, monkeypatch):
    given = trained(make_trainer())
    prompt = given._tokenize_prompts(["a"])[0]
    ids, logprobs = given._generate_single_turn(prompt, None, {}, 1)
    assert len(ids[0]) == len(logprobs[0]) and max(logprobs[0]) <= 0
    kept = type(given)._generate_single_turn
    withheld = make_trainer()
    monkeypatch.setattr(type(given), "_generate_single_turn", lambda *a, **k: (kept(*a, **k)[0], None))
    assert_same(given, trained(withheld))


def test_a_later_turn_is_cut_at_the_end_of_the_context(make_trainer, peeking):
    trainer = make_trainer()
    long = [[5] * 127]
    with pytest.raises(ValueError, match="context of 128"):
        trainer._generate_single_turn(long, None, {}, 1)
    trainer._turn = 1
    ids, logprobs = trainer._generate_single_turn(long, None, {}, 1)
    assert len(ids[0]) == len(logprobs[0]) == 1


def test_more_than_text_is_refused(make_trainer, peeking):
    trainer = make_trainer()
    with pytest.raises(ValueError, match=r"images.*text-only"):
        trainer._generate_single_turn([[5]], [[object()]], {}, 1)
    with pytest.raises(ValueError, match="pixel_values"):
        trainer._generate_single_turn([[5]], None, {"pixel_values": [[1.0]]}, 1)
    assert trainer._generate_single_turn([[5], [6, 7]], None, {"token_type_ids": [[0], [0, 0]]}, 1)


def test_gradient_checkpointing_and_mode_are_as_before(make_trainer, peeking):
    trainer = make_trainer()
    trainer.model.train()
    trainer.model.gradient_checkpointing_enable()
    trainer._generate(["a", "b"])
    assert trainer.model.training and trainer.model.is_gradient_checkpointing
