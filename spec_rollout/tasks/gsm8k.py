r"""GSM8K: grade-school word problems, their prompts, and a reward that checks the answer.

A row has a `question` and an `answer`, a worked solution whose last line is `#### N`
([openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k)). The policy is asked for `\boxed{N}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from spec_rollout.tasks.arithmetic import text_of

COLUMNS = ("question", "answer")
INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."

NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
SOLUTION = re.compile(rf"####\s*\$?({NUMBER})\s*$")
BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
BARE = re.compile(NUMBER)


def to_prompt(row: Mapping[str, str]) -> dict[str, Any]:
    """A row of GSM8K as the trainers read it: a conversational `prompt`, and `answer`, the number alone.

    Raises:
        ValueError: the solution does not end with `#### N`.
    """
    found = SOLUTION.search(row["answer"])
    if found is None:
        raise ValueError(
            f"answer={row['answer'][-60:]!r} does not end with '#### N': give rows of GSM8K's form, or leave "
            "dataset_format out and bring a reward of your own."
        )
    content = f"{row['question'].strip()}\n{INSTRUCTION}"
    return {"prompt": [{"role": "user", "content": content}], "answer": found[1].replace(",", "")}


def final_number(text: str) -> Decimal | None:
    r"""The number in the last `\boxed{}`, currency signs and units aside; None where there is not exactly one."""
    boxes = BOXED.findall(text)
    numbers = BARE.findall(boxes[-1]) if boxes else []
    return Decimal(numbers[0].replace(",", "")) if len(numbers) == 1 else None


def accuracy_reward(completions: list[Any], answer: list[str], **kwargs) -> list[float]:
    """TRL reward: 1.0 where a completion's boxed number equals the answer, else 0.0.

    A completion is a string, or a conversation (a list of messages) whose last message is read.
    """
    return [float(final_number(text_of(c)) == Decimal(a)) for c, a in zip(completions, answer, strict=True)]
