"""Completions that end by a stop string, cut where it is complete.

vLLM looks for stop strings once a step. Of a step that emitted several tokens it keeps those behind the string too, so
that a completion with guesses would be longer than the same one without.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from spec_rollout.engine.stops import NO_TOKEN
from spec_rollout.records import Completion


class StopStrings:
    """
    Args:
        strings: the strings; none cuts nothing.

    Raises:
        ValueError: there are some, and no tokenizer to match them by.
    """

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase | None):
        if strings and tokenizer is None:
            raise ValueError(
                f"stop_strings={tuple(strings)} need a tokenizer to be matched: set the backend's `tokenizer`."
            )
        self.criteria = StopStringCriteria(tokenizer, list(strings)) if strings else None

    def cut(self, completion: Completion) -> Completion:
        """`completion` up to the token that completes a stop string; itself if none does."""
        if self.criteria is None or not completion.token_ids:
            return completion
        reach = self.criteria.maximum_token_len
        padded = torch.tensor([NO_TOKEN] * (reach - 1) + completion.token_ids)
        ends = self.criteria(padded.unfold(0, reach, 1), None).nonzero()
        if not len(ends):
            return completion
        size = int(ends[0]) + 1
        if size == len(completion.token_ids):
            return completion
        return Completion(completion.token_ids[:size], completion.logprobs[:size], "stop")
