"""The task: its problems are right, its answers are read as meant, its text survives the tokenizer."""

import random
import re
from statistics import median

import pytest

from spec_rollout.training.arithmetic import (
    LARGEST_TOTAL,
    accuracy_reward,
    apply,
    chain,
    final_answer,
    problems,
    prompt_dataset,
    sft_dataset,
    solve,
    split,
)

PROBLEMS = problems("heldout", 500)


def value(text: str) -> int:
    """What the chain in `text` comes to from left to right; no total on the way is out of range."""
    first, *steps = re.findall(r"[-+*]?\d+", text)
    total = int(first)
    for step in steps:
        total = apply(total, (step[0], int(step[1:])))
        assert 0 <= total <= LARGEST_TOTAL
    return total


def test_the_answer_is_what_the_chain_comes_to():
    for problem in PROBLEMS:
        assert value(problem.prompt) == problem.answer == final_answer(problem.solution)
        assert len(re.findall(r"[-+*]", problem.prompt)) == problem.num_steps


def test_every_line_of_a_solution_comes_to_the_answer():
    lines = [(line, p.answer) for p in PROBLEMS for line in p.solution.split("\n") if re.search(r"\d", line)]
    assert len(lines) > 2000
    assert all(value(line) == answer for line, answer in lines)


@pytest.mark.parametrize(
    ("step", "parts"),
    [
        (("+", 8), [("+", 5), ("+", 3)]),
        (("-", 6), [("-", 5), ("-", 1)]),
        (("-", 5), [("-", 5)]),
        (("*", 2), [("*", 2)]),
    ],
)
def test_split(step, parts):
    assert split(step) == parts


def test_solve(monkeypatch):
    steps = [("+", 8), ("*", 2), ("-", 4)]
    assert chain(17, steps) == "17+8*2-4"
    monkeypatch.setattr("spec_rollout.training.arithmetic.SPLIT_ODDS", 0)
    assert solve(random.Random(0), 17, steps) == (["25*2-4", "50-4", "46"], 46)
    monkeypatch.setattr("spec_rollout.training.arithmetic.SPLIT_ODDS", 1)
    lines = ["17+5+3*2-4", "22+3*2-4", "25*2-4", "50-4", "46"]
    assert solve(random.Random(0), 17, steps) == (lines, 46)


def test_splits_and_seeds_are_reproducible_and_apart():
    assert problems("sft", 50, seed=3) == problems("sft", 50, seed=3)
    streams = [problems("sft", 50, seed=3), problems("sft", 50, seed=4), problems("rl", 50, seed=3)]
    assert len({p.prompt for stream in streams for p in stream}) == 150


def test_datasets_carry_the_same_problems():
    sft, rl = sft_dataset(5, seed=1), prompt_dataset("rl", 5, seed=1)
    assert sft.column_names == ["prompt", "completion"] and rl.column_names == ["prompt", "answer"]
    assert [row["completion"] for row in sft] == [p.solution for p in problems("sft", 5, seed=1)]
    assert [row["answer"] for row in rl] == [p.answer for p in problems("rl", 5, seed=1)]


def test_solutions_have_a_tail():
    lengths = sorted(len(p.solution) for p in PROBLEMS)
    assert lengths[475] > 1.8 * median(lengths) > 5 * lengths[0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("4+4=8.\nAnswer: 8", 8),
        ("Answer: 8\n", 8),
        ("Answer:-8", -8),
        ("Answer: 7\nno, wait\nAnswer: 8", 8),
        ("Answer: ", None),
        ("Answer: 8.5", None),
        ("Answer: 8 coins", None),
        ("the answer: 8", None),
        ("Answer: " + "9" * 9999, None),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_reward_reads_strings_and_conversations():
    completions = ["Answer: 5", "Answer: 6", "", None, [], [{"role": "assistant", "content": "2+3=5\nAnswer: 5"}]]
    rewards = accuracy_reward(prompts=["?"] * 6, completions=completions, answer=[5] * 6, completion_ids=None)
    assert rewards == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_reward_wants_an_answer_per_completion():
    with pytest.raises(ValueError):
        accuracy_reward(["Answer: 5"], answer=[5, 5])
