"""GSM8K: its rows as prompts, its answers checked; `training/test_gsm8k.py` goes on to a trained policy."""

from __future__ import annotations

from decimal import Decimal

import pytest
from datasets import Dataset

from spec_rollout.tasks.gsm8k import accuracy_reward, final_number, to_prompt
from spec_rollout.training.launch import ScriptArguments, load_reward_funcs, load_split

ROWS = [
    {"question": "Two and two? ", "answer": "2+2 = <<2+2=4>>4\n#### 4"},
    {"question": "Price?", "answer": "It is $1,250.\n#### 1,250"},
    {"question": "Debt?", "answer": "Less than nothing.\n#### -3.5"},
]


def test_rows_become_prompts():
    prompts = [to_prompt(row) for row in ROWS]
    assert [prompt["answer"] for prompt in prompts] == ["4", "1250", "-3.5"]
    (message,) = prompts[0]["prompt"]
    assert message["role"] == "user" and message["content"].startswith("Two and two?\nPlease reason")
    with pytest.raises(ValueError, match="does not end with '#### N'"):
        to_prompt({"question": "?", "answer": "four"})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"so \boxed{4}.", 4),
        (r"\boxed{5} or rather \boxed{4}", 4),
        (r"\boxed{ \$1,250.00 }", 1250),
        (r"\boxed{-3.5 \text dollars}", Decimal("-3.5")),
        (r"\boxed{4", None),
        (r"\boxed{}", None),
        (r"\boxed{4 or 5}", None),
        ("#### 4", None),
        ("", None),
    ],
)
def test_the_boxed_number_is_read(text, number):
    assert final_number(text) == number


def test_the_reward():
    said = [r"\boxed{4}", [{"role": "assistant", "content": r"\boxed{4.0}"}], r"\boxed{40}", "4"]
    assert accuracy_reward(said, answer=["4"] * 4, other="ignored") == [1.0, 1.0, 0.0, 0.0]


def test_foreign_columns_are_refused(tmp_path):
    Dataset.from_list([{"question": "a", "solution": "#### 1"}]).to_json(tmp_path / "data.jsonl")
    script = ScriptArguments(dataset_name=str(tmp_path / "data.jsonl"), dataset_format="gsm8k")
    with pytest.raises(ValueError, match="has no answer: rename its columns"):
        load_split(script, "train")
    assert load_reward_funcs(script) == [accuracy_reward]
