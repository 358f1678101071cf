"""Prompts of plain text for TRL's rollout process, which knows conversations only."""

from __future__ import annotations

import copy
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""Text as it is."""
RESPONSE = {"defaults": {"role": "assistant"}, "fields": {"content": {"content": "text"}}}
"""The same, read back."""


def as_conversations(dataset: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, PreTrainedTokenizerBase]:
    """`dataset` and `tokenizer`, or copies by which prompts of plain text are conversations of one message, rendered
    as they are; rewards then read completions as conversations too."""
    if not isinstance(dataset, Dataset) or not isinstance(dataset[0].get("prompt"), str):
        return dataset, tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, RESPONSE
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in dataset]
    return Dataset.from_list(rows), tokenizer
