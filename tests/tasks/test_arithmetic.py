"""The task: its problems are right, its answers are read as meant, its text survives the tokenizer."""

import random
import re
from dataclasses import replace
from statistics import median

import pytest

from spec_rollout.tasks.arithmetic import (
    FULL_SENTENCES,
    VARIED,
    Style,
    accuracy_reward,
    apply,
    final_answer,
    lettered,
    problems,
    prompt_dataset,
    solve,
    split,
)

STYLES = pytest.mark.parametrize("style", [VARIED, FULL_SENTENCES], ids=["varied", "full_sentences"])


def comes_to(start: str, steps: list[str], style: Style) -> int:
    """What `start` becomes by signed `steps`; no total on the way is out of range."""
    total = int(start)
    for step in steps:
        total = apply(total, (step[0], int(step[1:])))
        assert 0 <= total <= style.largest_total
    return total


@STYLES
def test_the_answer_is_what_the_steps_come_to(style):
    for problem in problems("heldout", 500, style=style):
        start, *steps = re.findall(r"[-+*]?\d+", problem.prompt)
        assert comes_to(start, steps, style) == problem.answer == final_answer(problem.solution)
        assert len(steps) == problem.num_steps


@STYLES
def test_every_sum_of_a_solution_is_right_and_starts_where_the_last_ended(style):
    checked = 0
    for problem in problems("heldout", 500, style=style):
        total = re.search(r"\d+", problem.prompt)[0]
        for before, step, after in re.findall(r"(\d+) ([-+*]\d+) = (\d+)", problem.solution):
            assert before == total and comes_to(before, [step], style) == int(after)
            total, checked = after, checked + 1
        assert int(total) == problem.answer
    assert checked > 3000


@pytest.mark.parametrize(
    ("step", "parts"),
    [
        (("+", 7), [("+", 4), ("+", 3)]),
        (("-", 5), [("-", 4), ("-", 1)]),
        (("-", 4), [("-", 4)]),
        (("*", 2), [("*", 2)]),
    ],
)
def test_split(step, parts):
    assert split(step, 4) == parts


@pytest.mark.parametrize(("odds", "first"), [(0, "17 +7 = 24"), (1, "17 +4 = 21, 21 +3 = 24")])
def test_solve(odds, first):
    steps = [("+", 7), ("*", 2), ("-", 4)]
    assert lettered(steps) == "a +7, b *2, c -4"
    style = replace(VARIED, split_odds=odds, lines=("Step {letter} {step}: {sums}.",))
    lines = [f"Step a +7: {first}.", "Step b *2: 24 *2 = 48.", "Step c -4: 48 -4 = 44."]
    assert solve(random.Random(0), 17, steps, style) == (lines, 44)


def test_a_whole_sentence_tells_the_total_before_and_after():
    style = replace(FULL_SENTENCES, split_odds=1)
    (line,), total = solve(random.Random(0), 7, [("+", 5)], style)
    assert line == "Step a is +5. We have 7, so we work out 7 +3 = 10, 10 +2 = 12. Now we have 12." and total == 12


def test_splits_and_seeds_are_reproducible_and_apart():
    assert problems("sft", 50, seed=3) == problems("sft", 50, seed=3)
    streams = [problems("sft", 50, seed=3), problems("sft", 50, seed=4), problems("rl", 50, seed=3)]
    assert len({p.prompt for stream in streams for p in stream}) == 150


def test_the_dataset_carries_the_same_problems():
    rows = prompt_dataset("rl", 5, seed=1)
    assert rows.column_names == ["prompt", "answer"]
    assert [(row["prompt"], row["answer"]) for row in rows] == [
        (p.prompt, p.answer) for p in problems("rl", 5, seed=1)
    ]


def test_solutions_have_a_tail():
    lengths = sorted(len(p.solution) for p in problems("heldout", 500))
    assert lengths[475] > 1.8 * median(lengths) > 5 * lengths[0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Step a +4: 4 +4 = 8.\nAnswer: 8", 8),
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
