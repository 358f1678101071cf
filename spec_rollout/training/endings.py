"""Whether a completion came to an end: TRL reads it off the last token, the sampler knows the finish reason."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import Trainer

from spec_rollout.records import Completion

NO_TOKEN = -1
ENDED = ("eos", "stop")
"""Finish reasons of a completion that came to an end; any other cut it off."""


class JudgedTokens(list):
    """Token ids [n] of a completion, whose `[-1]` is `end`; everything else is as in the list.

    TRL asks for `ids[-1]` to tell whether a completion ended, and for nothing else; it takes its own EOS ids and the
    pad token for ends. A stop string, or an EOS id that only the caller named, is an end that it would not see.
    """

    def __init__(self, ids: Sequence[int], end: int):
        super().__init__(ids)
        self.end = end

    def __getitem__(self, place):
        return self.end if place == -1 else super().__getitem__(place)


def ends_for_trl(trainer: Trainer) -> list[int]:
    """The last tokens by which TRL knows a completion that ended."""
    return [*trainer.eos_token_ids, trainer._tokenizer.pad_token_id]


def judge(ids: list[int], ended: bool, ends: Sequence[int]) -> list[int]:
    """`ids` as TRL shall have them: itself where TRL judges rightly by `ends`, else with the answer that is right."""
    if (ids[-1] in ends) == ended:
        return ids
    return JudgedTokens(ids, ends[0] if ended else NO_TOKEN)


def judged(trainer: Trainer, completions: Sequence[Completion]) -> list[list[int]]:
    """Token ids of `completions` for TRL."""
    ends = ends_for_trl(trainer)
    return [judge(c.token_ids, c.finish_reason in ENDED, ends) for c in completions]


def judged_turns(
    trainer: Trainer,
    prompt_ids: Sequence[list[int]],
    completion_ids: Sequence[list[int]],
    before: Sequence[list[int]],
    turns: Sequence[tuple[Sequence[Sequence[int]], Sequence[Completion]]],
) -> list[list[int]]:
    """Token ids after a tool loop: what the loop went on with has the finish reason of its last turn.

    Args:
        prompt_ids, completion_ids: of each conversation, the latter with what tools said.
        before: its `completion_ids` before the loop, judged already; the same object where the loop left it.
        turns: prompts and completions of the turns that the loop sampled. One that TRL cut is not among them, and is
            cut off.
    """
    reasons = {
        (*prompt, *completion.token_ids): completion.finish_reason
        for prompts, completions in turns
        for prompt, completion in zip(prompts, completions, strict=True)
    }
    ends = ends_for_trl(trainer)
    return [
        ids if ids is first else judge(ids, reasons.get((*prompt, *ids)) in ENDED, ends)
        for prompt, ids, first in zip(prompt_ids, completion_ids, before, strict=True)
    ]


def plain(completion_ids: Sequence[list[int]]) -> list[list[int]]:
    """The same token ids as lists that have nothing to tell, for reward functions."""
    return [list(ids) for ids in completion_ids]
