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


@dataclass(frozen=True)
class Style:
    """How hard the problems are, and how their solutions are worded."""

    step_weights: tuple[int, ...]
    """Odds of a problem having 1, 2, ... steps."""
    largest_total: int
    largest_operand: int
    largest_part: int
    """Larger operands may be split before they are added or subtracted."""
    split_odds: float
    """Share of those operands that are."""
    questions: tuple[str, ...]
    openings: tuple[str, ...]
    lines: tuple[str, ...]
    closings: tuple[str, ...]


VARIED = Style(
    step_weights=(1, 3, 5, 7, 8, 8, 7, 6, 5, 4, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1),  # a few are much longer than most
    largest_total=49,
    largest_operand=7,
    largest_part=4,
    split_odds=0.4,
    questions=("Start with {start}: {steps}\n", "Take {start}, then {steps}\n", "Begin at {start} and go {steps}\n"),
    openings=("Let us go step by step.", "We take the steps in order.", ""),
    lines=("Step {letter} {step}: {sums}.", "Then {letter} {step}: {sums}.", "Now {letter} {step}: {sums}."),
    closings=("That is all.", "No step is left.", ""),
)
"""Terse lines in several wordings: little of a solution can be foreseen."""
FULL_SENTENCES = Style(
    step_weights=(0, 1, 3, 5, 7, 7, 6, 5, 4, 3, 2, 2),
    largest_total=19,
    largest_operand=5,
    largest_part=3,
    split_odds=0.4,
    questions=("Start with {start}: {steps}\n",),
    openings=("Let us go step by step.",),
    lines=("Step {letter} is {step}. We have {before}, so we work out {sums}. Now we have {after}.",),
    closings=("No step is left, and we are done.",),
)
"""Small numbers, and steps told in whole sentences, of which much can be foreseen, as of what chat models write."""
STYLES = {"varied": VARIED, "full_sentences": FULL_SENTENCES}

DOUBLE_ODDS = 0.1
"""Share of the steps that double, where the total allows it."""

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


def split(step: Step, largest_part: int) -> list[Step]:
    """A sum or difference of more than `largest_part` as that and the rest; any other step as it is."""
    operator, n = step
    whole = operator == "*" or n <= largest_part
    return [step] if whole else [(operator, largest_part), (operator, n - largest_part)]


def lettered(steps: list[Step]) -> str:
    """The steps as the question lists them: `a +7, b -5`."""
    return ", ".join(f"{letter} {operator}{n}" for letter, (operator, n) in zip(ascii_lowercase, steps, strict=False))


def draw_step(rng: random.Random, total: int, style: Style) -> Step:
    """A step that keeps `total` between 0 and the style's largest."""
    if 0 < total * 2 <= style.largest_total and rng.random() < DOUBLE_ODDS:
        return "*", 2
    n = rng.randint(2, style.largest_operand)
    choices = ["+"] * (total + n <= style.largest_total) + ["-"] * (total >= n)
    return rng.choice(choices), n


def solve(rng: random.Random, total: int, steps: list[Step], style: Style) -> tuple[list[str], int]:
    """A line for each step, and the number that they come to."""
    lines = []
    for letter, step in zip(ascii_lowercase, steps, strict=False):
        sums, first = [], total
        for part in split(step, style.largest_part) if rng.random() < style.split_odds else [step]:
            before, total = total, apply(total, part)
            sums.append(f"{before} {part[0]}{part[1]} = {total}")
        words = {"letter": letter, "step": f"{step[0]}{step[1]}", "before": first, "after": total}
        lines.append(rng.choice(style.lines).format(sums=", ".join(sums), **words))
    return lines, total


def draw_problem(rng: random.Random, style: Style) -> Problem:
    """A random problem; the random stream decides the numbers, the wording and the way of the solution."""
    total = start = rng.randint(2, style.largest_total)
    steps: list[Step] = []
    for _ in range(1 + rng.choices(range(len(style.step_weights)), style.step_weights)[0]):
        steps.append(draw_step(rng, total, style))
        total = apply(total, steps[-1])
    worked, answer = solve(rng, start, steps, style)
    lines = [rng.choice(style.openings), *worked, rng.choice(style.closings), f"Answer: {answer}"]
    prompt = rng.choice(style.questions).format(start=start, steps=lettered(steps))
    return Problem(prompt, "\n".join(line for line in lines if line), answer, len(steps))


def problems(part: Part, count: int, seed: int = 0, style: Style = VARIED) -> list[Problem]:
    """`count` problems of a part of the data; parts draw from separate random streams."""
    rng = random.Random(f"arithmetic/{part}/{seed}")
    return [draw_problem(rng, style) for _ in range(count)]


def prompt_dataset(part: Part, count: int, seed: int = 0, style: Style = VARIED) -> Dataset:
    """Columns `prompt` and `answer`, for TRL's GRPO, RLOO and PPO trainers."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": p.prompt, "answer": p.answer} for p in problems(part, count, seed, style)])


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
