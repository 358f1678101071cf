"""Tools, environments and masked truncation through our sampler.

They match the tests of TRL that hand it completions by replacing `model.generate`; here the policy draws them.
"""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer, SpecRLOOConfig, SpecRLOOTrainer
from tests.training import talking
from tests.training.talking import logged
from tests.training.test_grpo import assert_same, trained

CHATS = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in ("3 times 4", "go", "hi")] * 4})
TALK = ("I do not", " know", " any tool")
STEP = ("<tool_call>", '\n{"name": "increment", "arguments": ', '{"step": 1}', "}\n</tool_call>")
GOOD = ("<tool_call>", '\n{"name": "multiply", "arguments": ', '{"a": 3, "b": 4}', "}\n</tool_call>")


def multiply(a: int, b: int) -> int:
    """
    Multiplies two numbers.

    Args:
        a: The first.
        b: The second.

    Returns:
        Their product.
    """
    return a * b


async def multiply_later(a: int, b: int) -> int:
    return multiply(a, b)


multiply_later.__doc__ = multiply.__doc__
multiply_later.__name__ = "multiply"


class Counter:
    def reset(self, **given):
        self._count = 0

    def increment(self, step: int) -> int:
        """
        Adds to the counter.

        Args:
            step: How much.

        Returns:
            What it comes to.
        """
        self._count += step
        return self._count


class ScoredCounter(Counter):
    def get_reward(self) -> float:
        return float(self._count)


class Asking:
    def reset(self, **given):
        return "Guess the word."


class Echo:
    def reset(self, **given):
        self._heard = []
        return "Echo."

    def shout(self, text: str) -> str:
        """
        Shouts a text.

        Args:
            text: What to shout.

        Returns:
            The text in upper case.
        """
        self._heard.append(text)
        return text.upper()


def speculated(trainer) -> bool:
    return min(logged(trainer, "speculative/mean_acceptance_length")) > 1.5


def roles(turns: list[dict]) -> list[str]:
    return [turn["role"] for turn in turns]


@pytest.mark.parametrize(
    ("tool", "policy"),
    [(multiply, talking.make_policy), (multiply_later, talking.make_policy), (multiply, talking.make_hybrid)],
    ids=["sync", "async", "hybrid"],
)
def test_the_tool_loop(make_talking, tool, policy):
    wrong = (*GOOD[:2], '{"a": 3, "c": 4}', GOOD[3])
    scripts = (GOOD, wrong, TALK)
    given = {"train_dataset": CHATS, "tools": [tool], "policy": policy}
    speculative = trained(make_talking(*scripts, **given))
    assert speculated(speculative)
    conversations = speculative.reward_funcs[0].turns
    calls = [call for turns in conversations for turn in turns for call in turn.get("tool_calls", [])]
    answers = [turn["content"] for turns in conversations for turn in turns if turn["role"] == "tool"]
    assert "12" in answers and any("error" in answer for answer in answers)
    assert {tuple(call["function"]["arguments"]) for call in calls} == {("a", "b"), ("a", "c")}
    assert any(len(turns) > 3 for turns in conversations)  # a call after a call
    assert 0 < min(logged(speculative, "tools/failure_frequency")) < 1
    assert max(logged(speculative, "sampling/sampling_logp_difference/max")) < 1e-3  # what tools said is left out
    count = sum(logged(speculative, "tools/call_frequency")) / len(logged(speculative, "tools/call_frequency"))
    assert count == pytest.approx(len(answers) / len(conversations))
    assert_same(speculative, trained(make_talking(*scripts, gamma=0, **given)))


def test_a_turn_that_fills_the_completion_is_cut(make_talking):
    trainer = make_talking(GOOD, train_dataset=CHATS, tools=[multiply], options={"max_completion_length": 100})
    trainer.train()
    lengths = [len(ids) for batch in trainer.reward_funcs[0].seen for ids in batch]
    assert 50 < max(lengths) <= 100 and speculated(trainer)


def test_malformed_calls_are_text(make_talking):
    broken = ("<tool_call>", '\n{"type": "function"', "\n</tool_call>")
    trainer = trained(make_talking(broken, (*TALK, "!"), train_dataset=CHATS, tools=[multiply]))
    assert speculated(trainer)
    assert set(logged(trainer, "tools/call_frequency")) == {0.0}
    conversations = trainer.reward_funcs[0].turns
    assert all(roles(turns) == ["assistant"] for turns in conversations)
    assert any('"type": "function"' in turns[0]["content"] for turns in conversations)


def test_an_environment_acts(make_talking):
    unknown = (STEP[0], '\n{"name": "decrement", "arguments": ', *STEP[2:])
    trainer = trained(make_talking(STEP, unknown, TALK, environment_factory=Counter, options={"seed": 1}))
    assert speculated(trainer)
    last = trainer.reward_funcs[0].turns[-8:]
    for environment, turns in zip(trainer.environments, last, strict=True):
        assert environment._count == sum(turn.get("content") == str(n) for n in range(1, 9) for turn in turns)
    assert len({environment._count for environment in trainer.environments}) > 1
    assert 0 < max(logged(trainer, "tools/failure_frequency")) < 1


def test_an_environment_that_owns_the_reward(make_talking):
    trainer = trained(make_talking(STEP, TALK, reward=None, environment_factory=ScoredCounter))
    assert trainer.reward_func_names == ["ScoredCounter"] and speculated(trainer)
    counts = [environment._count for environment in trainer.environments]
    assert logged(trainer, "reward")[-1] == pytest.approx(sum(counts) / len(counts))


def test_an_environment_that_owns_the_data(make_talking):
    trainer = trained(make_talking(TALK, ("Done",), environment_factory=Asking))
    assert speculated(trainer)
    assert {turns[0]["content"] for turns in trainer.reward_funcs[0].turns} == {"".join(TALK), "Done"}


def test_several_environments(make_talking):
    shout = (STEP[0], '\n{"name": "shout", "arguments": ', '{"text": "hi"}', STEP[3])
    rows = Dataset.from_dict({"environment": ["counter", "echo"] * 4})
    trainer = trained(
        make_talking(
            STEP,
            shout,
            TALK,
            train_dataset=rows,
            environment_factory={"counter": Counter, "echo": Echo},
            options={"num_generations": 4, "shuffle_dataset": False},
        )
    )
    assert speculated(trainer)
    kinds = [type(environment) for environment in trainer.environments]
    assert kinds == [Counter] * 4 + [Echo] * 4
    heard = [word for environment in trainer.environments[4:] for word in environment._heard]
    assert set(heard) <= {"hi"} and 0 < max(logged(trainer, "tools/failure_frequency")) < 1


@pytest.mark.parametrize(
    ("trainer_class", "config_class"), [(SpecGRPOTrainer, SpecGRPOConfig), (SpecRLOOTrainer, SpecRLOOConfig)]
)
def test_truncated_completions_are_masked(make_talking, monkeypatch, trainer_class, config_class):
    batches = []
    score = trainer_class._generate_and_score_completions
    monkeypatch.setattr(
        trainer_class,
        "_generate_and_score_completions",
        lambda self, inputs: batches.append(score(self, inputs)) or batches[-1],
    )
    options = {"mask_truncated_completions": True, "max_completion_length": 3, "max_steps": 2, "num_generations": 8}
    chosen = {"classes": (trainer_class, config_class), "train_dataset": CHATS, "options": options}
    trainer = trained(make_talking(TALK, ("Done", "!"), ("Done",), **chosen))
    assert speculated(trainer)
    end = trainer.processing_class.eos_token_id
    for batch in batches:
        complete = torch.tensor([end in ids for ids in batch["completion_ids"].tolist()])
        assert complete.any() and not complete.all()  # "Done" "!" and the end just fit; the other is cut
        assert (batch["completion_mask"].sum(1) > 0).tolist() == complete.tolist()
    assert 0 < min(logged(trainer, "completions/clipped_ratio")) < 1
