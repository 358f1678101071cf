"""A prompt that is too long for the policy's context: refused, clipped or skipped, as the option says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from spec_rollout.config import SpecConfig
from spec_rollout.training import (
    PPOConfig,
    SpecGRPOConfig,
    SpecGRPOTrainer,
    SpecRLOOConfig,
    SpecRLOOTrainer,
    make_rollout_func,
)
from spec_rollout.training.prompts import context_of
from tests.tiny import make_policy
from tests.training.test_grpo import trained

CONTEXT, NEW = 128, 12  # of the policy, max_completion_length
ROOM = CONTEXT - NEW
LONG = "abc " * 40
ROWS = Dataset.from_dict({"prompt": ["one", LONG, "two", "three", LONG + "d", "four", "five", "six"]})
TRAINERS = [(SpecGRPOTrainer, SpecGRPOConfig), (SpecRLOOTrainer, SpecRLOOConfig)]


def sampled_prompts(trainer) -> list[list[int]]:
    """What the sampler is given; filled while the trainer runs."""
    seen, sample = [], trainer.sampler.sample
    trainer.sampler.sample = lambda t, prompts, *a, **k: seen.extend(prompts) or sample(t, prompts, *a, **k)
    return seen


def batches_of(trainer) -> list[dict]:
    batches, score = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append(score(inputs)) or batches[-1]
    return batches


@pytest.mark.parametrize(("trainer_class", "config_class"), TRAINERS)
def test_a_long_prompt_is_refused_with_the_choice(make_trainer, peeking, trainer_class, config_class):
    trainer = make_trainer(trainer_class, config_class, arguments={"train_dataset": ROWS}, max_steps=4)
    with pytest.raises(ValueError, match=r"has 16[01] tokens.*context of 128.*='clip' to keep the last 116 .*'skip'"):
        trainer.train()


@pytest.mark.parametrize(("trainer_class", "config_class"), TRAINERS)
def test_a_clipped_prompt_keeps_its_end(make_trainer, peeking, tokenizer, trainer_class, config_class):
    given = {"train_dataset": ROWS.select([1, 4])}
    trainer = make_trainer(trainer_class, config_class, arguments=given, overlong_prompts="clip", max_steps=1)
    seen, batches = sampled_prompts(trainer), batches_of(trainer)
    with pytest.warns(UserWarning, match="more than 116 tokens lose their beginning"):
        trained(trainer)
    whole = [tokenizer(row["prompt"])["input_ids"] for row in ROWS.select([1, 4])]
    assert {tuple(ids) for ids in seen} == {tuple(ids[-ROOM:]) for ids in whole}
    assert {len(row) for batch in batches for row in batch["prompt_ids"].tolist()} == {ROOM}  # what is learned from


@pytest.mark.parametrize(("trainer_class", "config_class"), TRAINERS)
def test_long_prompts_are_skipped(make_trainer, peeking, caplog, trainer_class, config_class):
    given = {"train_dataset": ROWS, "eval_dataset": {"some": ROWS.select([0, 1])}}
    trainer = make_trainer(trainer_class, config_class, arguments=given, overlong_prompts="skip", max_steps=4)
    assert trainer.train_dataset["prompt"] == [row for row in ROWS["prompt"] if not row.startswith(LONG)]
    assert trainer.eval_dataset["some"]["prompt"] == ["one"]
    assert [r.getMessage() for r in caplog.records if r.name.startswith("spec_rollout")] == [
        "overlong_prompts='skip' leaves 2 of 8 prompts out of train_dataset.",
        "overlong_prompts='skip' leaves 1 of 2 prompts out of some.",
    ]
    trained(trainer)


def test_chats_are_measured_with_their_template(make_trainer, peeking, tokenizer):
    edge = ROOM - len(tokenizer.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True)[
        "input_ids"
    ])  # fmt: skip
    chats = Dataset.from_dict({"prompt": [[{"role": "user", "content": "a" * n}] for n in (edge, edge + 1)]})
    trainer = make_trainer(arguments={"train_dataset": chats}, overlong_prompts="skip")
    assert [len(row[0]["content"]) for row in trainer.train_dataset["prompt"]] == [edge]


def test_what_cannot_be_skipped_is_said(make_trainer, peeking):
    with pytest.raises(ValueError, match=r"No prompt of train_dataset has 116 tokens or fewer.*'clip'"):
        make_trainer(arguments={"train_dataset": ROWS.select([1, 4])}, overlong_prompts="skip")
    trainer = make_trainer(max_completion_length=CONTEXT, overlong_prompts="clip")
    with pytest.raises(ValueError, match=r"max_completion_length=128 leaves no room.*lower it to less than 128"):
        trainer.train()


def test_a_rollout_func_clips(make_trainer, peeking):
    def build(**options):
        rollout_func = make_rollout_func(SpecConfig(num_speculative_tokens=2), **options)
        given = {"rollout_func": rollout_func, "train_dataset": ROWS.select([1, 4])}
        return make_trainer(GRPOTrainer, GRPOConfig, arguments=given, max_steps=1)

    with pytest.raises(ValueError, match="overlong_prompts='clip'"):
        build().train()
    trainer = build(overlong_prompts="clip")
    batches = batches_of(trainer)
    trained(trainer)
    assert batches[0]["prompt_ids"].shape[1] == ROOM
    with pytest.raises(ValueError, match="overlong_prompts='skip' .* rollout function: give 'refuse' or 'clip'"):
        build(overlong_prompts="skip")


@pytest.mark.parametrize("config_class", [SpecGRPOConfig, SpecRLOOConfig, PPOConfig])
def test_an_unknown_choice(tmp_path, config_class):
    with pytest.raises(ValueError, match="overlong_prompts='cut' is unknown: give one of refuse, clip, skip"):
        config_class(str(tmp_path), use_cpu=True, bf16=False, overlong_prompts="cut")


@pytest.mark.parametrize(
    ("recurrent", "options", "room"),
    [
        (False, {"num_speculative_tokens": 3}, 64),
        (True, {"num_speculative_tokens": 0}, 64),
        (True, {"num_speculative_tokens": 5}, 59),
        (True, {}, 61),
        (True, {"vllm_max_model_length": 40}, 40),
        (True, {"vllm_max_model_length": 62}, 61),
        (True, {"vllm_mode": "server"}, 57),  # of max_num_speculative_tokens=7
        (True, {"vllm_mode": "server", "num_speculative_tokens": 2}, 62),
        (True, {"rollout_backend": "embedded", "num_speculative_tokens": 5}, 64),
    ],
)
def test_guesses_that_vllm_cannot_do_without_keep_their_room(recurrent, options, room):
    """What is clipped, skipped, or cut in a tool loop is what vLLM then takes."""
    model = make_policy("qwen3_5_text" if recurrent else "glm4_moe")
    model.config.max_position_embeddings = 64
    given = {"num_speculative_tokens": None, "vllm_max_model_length": None, "vllm_mode": "colocate"} | options
    lengths = given.pop("vllm_max_model_length"), given.pop("vllm_mode")
    args = SpecConfig(**{"rollout_backend": "vllm", "draft_head": "mtp", **given})
    args.vllm_max_model_length, args.vllm_mode = lengths
    unwrap = SimpleNamespace(unwrap_model=lambda model: model)
    assert context_of(SimpleNamespace(model=model, args=args, accelerator=unwrap)) == room
