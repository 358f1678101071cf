"""A completion that ended by a stop string, or by an EOS id of the caller's own, has ended for TRL too."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from spec_rollout.config import SpecConfig
from spec_rollout.records import Completion
from spec_rollout.training import (
    SpecGRPOConfig,
    SpecGRPOTrainer,
    SpecRLOOConfig,
    SpecRLOOTrainer,
    make_rollout_func,
)
from spec_rollout.training.endings import JudgedTokens, judge, plain
from spec_rollout.training.sampler import TrainerSampler
from tests.training import talking
from tests.training.test_tools import CHATS, GOOD, TALK, multiply

LONG = ("Well", ", that", " is", " long", " to", " say")
ENDINGS = {"stop strings": {"stop_strings": ["e", "7"]}, "an EOS id of the caller's": {"eos_token_id": [7, 30]}}
TRAINERS = {
    "grpo": (SpecGRPOTrainer, SpecGRPOConfig),
    "rloo": (SpecRLOOTrainer, SpecRLOOConfig),
    "rollout_func": (GRPOTrainer, GRPOConfig),
}


@pytest.fixture
def drawn(monkeypatch) -> list[list[Completion]]:
    """What each call of the sampler returned."""
    calls = []
    sample = TrainerSampler.sample

    def spy(self, *given, **options):
        calls.append(copy.deepcopy(sample(self, *given, **options)))
        return copy.deepcopy(calls[-1])

    monkeypatch.setattr(TrainerSampler, "sample", spy)
    return calls


def batches_of(trainer) -> list[dict]:
    batches, score = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append(score(inputs)) or batches[-1]
    return batches


def built(make_trainer, kind, **options):
    trainer_class, config_class = TRAINERS[kind]
    arguments = {}
    if kind == "rollout_func":
        arguments = {"rollout_func": make_rollout_func(SpecConfig(num_speculative_tokens=2))}
    return make_trainer(trainer_class, config_class, arguments=arguments, **options)


def test_only_the_last_token_is_answered_for():
    assert judge([5, 1], True, [1, 0]) == [5, 1] and not isinstance(judge([5, 1], True, [1, 0]), JudgedTokens)
    stopped, padded = judge([5, 6], True, [1, 0]), judge([5, 0], False, [1, 0])
    assert stopped[-1] == 1 and padded[-1] not in (1, 0)
    for row, ids in ((stopped, [5, 6]), (padded, [5, 0]), (pickle.loads(pickle.dumps(stopped)), [5, 6])):
        assert row == ids and [*row] == row[:] == plain([row])[0] == ids and row[1] == ids[1] and row[-2] == 5
        assert torch.tensor(row).tolist() == ids and [4] + row == [4, *ids] and plain([row])[0][-1] == ids[1]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", TRAINERS)
def test_what_trl_logs_and_masks_is_the_finish_reason(make_trainer, peeking, drawn, kind, ending):
    options = {"mask_truncated_completions": True, "generation_kwargs": ENDINGS[ending], "beta": 0.0}
    trainer = built(make_trainer, kind, **options)
    batches = batches_of(trainer)
    trainer.train()
    last_tokens_told = trainer.reward_funcs[0].seen
    logs = [entry for entry in trainer.state.log_history if "completions/clipped_ratio" in entry]
    for logged, batch, told, completions in zip(logs, batches, last_tokens_told, drawn, strict=True):
        ended = [c.finish_reason != "length" for c in completions]
        assert int((batch["completion_mask"].sum(1) > 0).sum()) == sum(ended)
        assert logged["completions/clipped_ratio"] == pytest.approx(1 - sum(ended) / len(ended))
        lengths = [len(c.token_ids) for c in completions if c.finish_reason != "length"]
        assert logged["completions/mean_terminated_length"] == pytest.approx(sum(lengths) / len(lengths))
        assert logged["completions/max_terminated_length"] == max(lengths)
        assert [ids[-1] for ids in told] == [c.token_ids[-1] for c in completions]  # rewards read what was drawn
    own = {"stop strings": "stop", "an EOS id of the caller's": "eos"}[ending]
    every = [c for completions in drawn for c in completions]
    assert any(c.finish_reason == own and c.token_ids[-1] not in (0, 1) for c in every)
    assert any(c.finish_reason == "length" for c in every)


def test_a_pad_token_at_the_bound_is_no_end(make_trainer, peeking, drawn, tokenizer):
    unlike = copy.deepcopy(tokenizer)
    unlike.pad_token, unlike.eos_token = "f", "9"
    trainer = make_trainer(arguments={"processing_class": unlike})
    trainer.train()
    padded = [[c.token_ids[-1] == 8 for c in completions] for completions in drawn]
    assert any(map(any, padded))
    for entry, completions in zip(trainer.state.log_history, drawn, strict=False):
        cut = [c.finish_reason == "length" for c in completions]
        assert entry["completions/clipped_ratio"] == pytest.approx(sum(cut) / len(cut))
        assert any(cut)


@pytest.mark.parametrize("ending", ENDINGS)
def test_ppo_penalises_what_was_cut_off_alone(make_ppo, peeking, drawn, ending):
    options = {"kl_coef": 0.0, "generation_kwargs": ENDINGS[ending]}
    without, penalised = make_ppo(**options), make_ppo(missing_eos_penalty=5.0, **options)
    for trainer in (without, penalised):
        trainer.train()
    cut = [c.finish_reason == "length" for c in drawn[0]]
    assert 0 < sum(cut) < len(cut)
    first = [
        next(e["penalized_reward"] for e in t.state.log_history if "penalized_reward" in e)
        for t in (without, penalised)
    ]
    assert first[0] - first[1] == pytest.approx(5.0 * sum(cut) / len(cut), abs=1e-5)


def test_after_a_tool_loop_the_last_turn_counts(make_talking, drawn):
    end = talking.make_tokenizer(GOOD, TALK, LONG).convert_tokens_to_ids(TALK[-1])
    options = {"mask_truncated_completions": True, "generation_kwargs": {"eos_token_id": end}}
    options |= {"max_completion_length": 26, "seed": 2}
    given = {"train_dataset": CHATS, "tools": [multiply], "options": options}
    trainer = make_talking(GOOD, TALK, LONG, **given)
    batches = batches_of(trainer)
    trainer.train()
    last = trainer.reward_funcs[0].seen[0]
    ended = [ids[-1] in (end, trainer._tokenizer.eos_token_id) for ids in last]
    assert any(len(ids) > len(TALK) and ids[-1] == end for ids in last) and len(drawn) > 1
    assert 0 < sum(ended) < len(ended)
    assert sum((batches[0]["completion_mask"].sum(1) > 0).tolist()) == sum(ended)
    assert trainer.state.log_history[0]["completions/clipped_ratio"] == pytest.approx(1 - sum(ended) / len(ended))
