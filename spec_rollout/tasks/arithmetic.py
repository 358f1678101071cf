"""Multi-step arithmetic with worked solutions: a task to train a policy on from nothing, and then to reinforce.

A problem is a number and a list of lettered steps: `Start with 37: a +7, b -5, c *2`. Its solution takes the steps one
line at a time and ends with `Answer: N`. A step is taken in one of two ways, picked at random: at once
(`Step a +7: 37 +7 = 44.`), short and easy to get wrong, or with the operand split (`Step a +7: 37 +4 = 41, 41 +3 =
44.`), longer and safer. A policy trained on the mixture is right some of the time and can learn to be right more
often, and its completions are of very uneven length.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datasets import Dataset

Part = Literal["sft", "rl", "heldout"]

STEP_WEIGHTS = (1, 3, 5, 7, 8, 8, 7, 6, 5, 4, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1)
"""Odds of a problem having 1, 2, ... 20 steps; the tail makes a few completions much longer than most."""

LARGEST_TOTAL, LARGEST_OPERAND, LARGEST_PART = 49, 7, 4
DOUBLE_ODDS = 0.1
"""Share of the steps that double, where the total allows it."""
SPLIT_ODDS = 0.4
"""Share of the operands above LARGEST_PART that are split before they are added or subtracted."""

QUESTIONS = ("Start with {start}: {steps}\n", "Take {start}, then {steps}\n", "Begin at {start} and go {steps}\n")
OPENINGS = ("Let us go step by step.", "We take the steps in order.", "")
LINES = ("Step {letter} {step}: {sums}.", "Then {letter} {step}: {sums}.", "Now {letter} {step}: {sums}.")
CLOSINGS = ("That is all.", "No step is left.", "")

MANY_SUMS = 24
"""Right sums for the whole of `worked_sums_reward`; a solution has 9 on the mean."""

SUM = re.compile(r"(\d+) ([+*-])(\d+) = (-?\d+)")
ANSWER = re.compile(r"^Answer:[ \t]*(-?\d{1,9})\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """One question, one of its possible worked solutions, and the number it comes to."""

    prompt: str
    solution: str
    answer: int
    num_steps: int


Step = tuple[str, int]
"""An operator (`+`, `-`, `*`) and its operand."""


def apply(total: int, step: Step) -> int:
    """What `total` becomes."""
    operator, n = step
    return {"+": total + n, "-": total - n, "*": total * n}[operator]


def split(step: Step) -> list[Step]:
    """A sum or difference of more than LARGEST_PART as that and the rest; any other step as it is."""
    operator, n = step
    whole = operator == "*" or n <= LARGEST_PART
    return [step] if whole else [(operator, LARGEST_PART), (operator, n - LARGEST_PART)]


def lettered(steps: list[Step]) -> str:
    """The steps as the question lists them: `a +7, b -5`."""
    return ", ".join(f"{letter} {operator}{n}" for letter, (operator, n) in zip(ascii_lowercase, steps, strict=False))


def draw_step(rng: random.Random, total: int) -> Step:
    """A step that keeps `total` between 0 and LARGEST_TOTAL."""
    if 0 < total * 2 <= LARGEST_TOTAL and rng.random() < DOUBLE_ODDS:
        return "*", 2
    n = rng.randint(2, LARGEST_OPERAND)
    choices = ["+"] * (total + n <= LARGEST_TOTAL) + ["-"] * (total >= n)
    return rng.choice(choices), n


def solve(rng: random.Random, total: int, steps: list[Step]) -> tuple[list[str], int]:
    """A line for each step, and the number that they come to."""
    lines = []
    for letter, step in zip(ascii_lowercase, steps, strict=False):
        sums = []
        for part in split(step) if rng.random() < SPLIT_ODDS else [step]:
            before, total = total, apply(total, part)
            sums.append(f"{before} {part[0]}{part[1]} = {total}")
        line = rng.choice(LINES)
        lines.append(line.format(letter=letter, step=f"{step[0]}{step[1]}", sums=", ".join(sums)))
    return lines, total


def draw_problem(rng: random.Random) -> Problem:
    """A random problem; the random stream decides the numbers, the wording and the way of the solution."""
    total = start = rng.randint(2, LARGEST_TOTAL)
    steps: list[Step] = []
    for _ in range(1 + rng.choices(range(len(STEP_WEIGHTS)), STEP_WEIGHTS)[0]):
        steps.append(draw_step(rng, total))
        total = apply(total, steps[-1])
    worked, answer = solve(rng, start, steps)
    lines = [rng.choice(OPENINGS), *worked, rng.choice(CLOSINGS), f"Answer: {answer}"]
    prompt = rng.choice(QUESTIONS).format(start=start, steps=lettered(steps))
    return Problem(prompt, "\n".join(line for line in lines if line), answer, len(steps))


def problems(part: Part, count: int, seed: int = 0) -> list[Problem]:
    """`count` problems of a part of the data; parts draw from separate random streams."""
    rng = random.Random(f"arithmetic/{part}/{seed}")
    return [draw_problem(rng) for _ in range(count)]


def prompt_dataset(part: Part, count: int, seed: int = 0) -> Dataset:
    """Columns `prompt` and `answer`, for TRL's GRPO, RLOO and PPO trainers."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": p.prompt, "answer": p.answer} for p in problems(part, count, seed)])


def final_answer(text: str) -> int | None:
    """The number after the last `Answer:`, or None where there is none."""
    found = ANSWER.findall(text)
    return int(found[-1]) if found else None


def accuracy_reward(completions: list[Any], answer: list[int], **kwargs) -> list[float]:
    """TRL reward: 1.0 where a completion's final answer equals the problem's, else 0.0.

    A completion is a string, or a conversation (a list of messages) whose last message is read.
    """
    return [float(final_answer(text_of(c)) == int(a)) for c, a in zip(completions, answer, strict=True)]


def worked_sums_reward(completions: list[Any], **kwargs) -> list[float]:
    """TRL reward: the share of MANY_SUMS right sums that a completion works through, whatever the problem.

    It pays for long solutions, so it moves a policy far from what it was trained to write.
    """
    found = [SUM.findall(text_of(completion)) for completion in completions]
    right = [sum(apply(int(a), (operator, int(b))) == int(c) for a, operator, b, c in sums) for sums in found]
    return [min(1.0, n / MANY_SUMS) for n in right]


def text_of(completion: Any) -> str:
    """The text of a completion in either of TRL's formats; anything else reads as empty."""
    if isinstance(completion, list) and completion and isinstance(completion[-1], dict):
        completion = completion[-1].get("content")
    return completion if isinstance(completion, str) else ""
