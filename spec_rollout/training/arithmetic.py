"""Multi-step arithmetic with worked solutions: a task to train a policy on from nothing, and then to reinforce.

A problem is a chain of additions, subtractions and doublings, worked from left to right. Its solution takes one step
per line and ends with `Answer: N`. A step is worked in one of two ways, picked at random: *direct* (`47+38=85`), short
and easy to get wrong, or *split* (`47+30=77, 77+8=85`), longer and safer. A policy trained on the mixture is right some
of the time and can learn to be right more often, and its completions are of very uneven length.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["sft", "rl", "heldout"]

STEP_WEIGHTS = (0, 6, 7, 8, 8, 7, 6, 5, 4, 3, 3, 2, 2, 2, 1, 1)
"""Odds of a problem having 1, 2, ... 16 steps; the tail makes a few completions much longer than most."""

LARGEST_TOTAL, LARGEST_OPERAND = 199, 49
DOUBLE_ODDS = 0.3
"""Share of the steps that double, where the total allows it."""
SPLIT_ODDS = 0.5
"""Share of the two-digit operands that are worked in two parts."""

QUESTIONS = ("Work out {expression}", "Compute {expression}", "What is {expression}")
OPENINGS = ("Let us go step by step.", "We work from left to right.", "Step by step:", "")
LINES = ("{work}", "so {work}", "then {work}", "next {work}")
CLOSINGS = ("That is all.", "Done.", "")

ANSWER = re.compile(r"^Answer:[ \t]*(-?\d{1,9})\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """One question, one of its possible worked solutions, and the number it comes to."""

    prompt: str
    solution: str
    answer: int
    num_steps: int


def work(total: int, operator: str, n: int, split: bool) -> tuple[str, int]:
    """The working of `total operator n` on one line, and its result; `split` adds tens and ones apart."""
    result = {"+": total + n, "-": total - n, "*": total * n}[operator]
    tens, ones = n // 10 * 10, n % 10
    if not split or operator == "*" or not tens or not ones:
        return f"{total}{operator}{n}={result}", result
    between = total + tens if operator == "+" else total - tens
    return f"{total}{operator}{tens}={between}, {between}{operator}{ones}={result}", result


def draw_step(rng: random.Random, total: int) -> tuple[str, int]:
    """An operator and an operand that keep `total` between 0 and LARGEST_TOTAL."""
    if 0 < total * 2 <= LARGEST_TOTAL and rng.random() < DOUBLE_ODDS:
        return "*", 2
    n = rng.randint(2, LARGEST_OPERAND)
    choices = ["+"] * (total + n <= LARGEST_TOTAL) + ["-"] * (total >= n)
    return rng.choice(choices), n


def draw_problem(rng: random.Random) -> Problem:
    """A random problem; the random stream decides the numbers, the wording and the way of the solution."""
    total = rng.randint(2, 99)
    num_steps = 1 + rng.choices(range(len(STEP_WEIGHTS)), STEP_WEIGHTS)[0]
    expression, lines = str(total), [rng.choice(OPENINGS)]
    for _ in range(num_steps):
        operator, n = draw_step(rng, total)
        expression += f"{operator}{n}"
        worked, total = work(total, operator, n, split=rng.random() < SPLIT_ODDS)
        lines.append(rng.choice(LINES).format(work=worked))
    lines += [rng.choice(CLOSINGS), f"Answer: {total}"]
    prompt = rng.choice(QUESTIONS).format(expression=expression) + "\n"
    return Problem(prompt, "\n".join(line for line in lines if line), total, num_steps)


def problems(split: Split, count: int, seed: int = 0) -> list[Problem]:
    """`count` problems of a split; splits draw from separate random streams."""
    rng = random.Random(f"arithmetic/{split}/{seed}")
    return [draw_problem(rng) for _ in range(count)]


def sft_dataset(count: int, seed: int = 0) -> Dataset:
    """Columns `prompt` and `completion`, for TRL's SFTTrainer."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": p.prompt, "completion": p.solution} for p in problems("sft", count, seed)])


def prompt_dataset(split: Split, count: int, seed: int = 0) -> Dataset:
    """Columns `prompt` and `answer`, for TRL's GRPO, RLOO and PPO trainers."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": p.prompt, "answer": p.answer} for p in problems(split, count, seed)])


def final_answer(text: str) -> int | None:
    """The number after the last `Answer:`, or None where there is none."""
    found = ANSWER.findall(text)
    return int(found[-1]) if found else None


def accuracy_reward(completions: list[Any], answer: list[int], **kwargs) -> list[float]:
    """TRL reward: 1.0 where a completion's final answer equals the problem's, else 0.0.

    A completion is a string, or a conversation (a list of messages) whose last message is read.
    """
    return [float(final_answer(text_of(c)) == int(a)) for c, a in zip(completions, answer, strict=True)]


def text_of(completion: Any) -> str:
    """The text of a completion in either of TRL's formats; anything else reads as empty."""
    if isinstance(completion, list) and completion and isinstance(completion[-1], dict):
        completion = completion[-1].get("content")
    return completion if isinstance(completion, str) else ""
