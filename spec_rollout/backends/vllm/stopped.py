"""Completions that end by a stop string, cut where it is complete.

vLLM looks for stop strings once a step, in what it has drawn. Of a step that emitted several tokens it keeps those
behind the string too, so that a completion with guesses would be longer than the same one without. And it does not
find a string that begins in the prompt, as transformers and the embedded engine do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import StopStringCriteria

from spec_rollout.engine.stops import NO_TOKEN
from spec_rollout.records import Completion


def cut(
    completions: list[Completion], prompts: Sequence[Sequence[int]], criteria: StopStringCriteria | None
) -> list[Completion]:
    """Each completion up to the token that completes a stop string of `criteria`; itself if none does."""
    if criteria is None:
        return completions
    return [_cut(*pair, criteria) for pair in zip(completions, prompts, strict=True)]


def _cut(completion: Completion, prompt: Sequence[int], criteria: StopStringCriteria) -> Completion:
    drawn = completion.token_ids
    if not drawn:
        return completion
    reach = criteria.maximum_token_len
    before = [NO_TOKEN] * (reach - 1) + list(prompt)
    known = torch.tensor(before[len(before) - reach + 1 :] + drawn)
    ends = criteria(known.unfold(0, reach, 1), None).nonzero()
    size = int(ends[0]) + 1 if len(ends) else len(drawn)
    return completion if size == len(drawn) else Completion(drawn[:size], completion.logprobs[:size], "stop")
