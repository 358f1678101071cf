"""From prompts to requests: checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from spec_rollout.engine.noise import request_keys
from spec_rollout.records import Request, SamplingParams


def make_requests(
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    seed: Sequence[int],
    max_new_tokens: Sequence[int] | None,
    vocab_size: int,
    context: int | None,
    switches: Sequence[int] = (),
) -> list[Request]:
    """One request per prompt, each with a noise key of its own. `switches` are the numbers of tokens beyond which the
    policy reads every position otherwise.

    Raises:
        ValueError: naming the entry, the bound and the remedy.
    """
    limits = [params.max_new_tokens] * len(prompts) if max_new_tokens is None else list(max_new_tokens)
    if len(limits) != len(prompts):
        raise ValueError(f"max_new_tokens has {len(limits)} entries for {len(prompts)} prompts: give one per prompt.")
    for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        _check(index, prompt, limit, vocab_size, context)
    for switch in switches if len(prompts) else ():
        _check_side(switch, [len(prompt) for prompt in prompts], max(limits))
    bad_eos = [token for token in params.eos_token_ids if not 0 <= token < vocab_size]
    if bad_eos:
        raise ValueError(f"eos_token_ids {bad_eos} are outside the vocabulary of {vocab_size} tokens; remove them.")
    keys = request_keys(seed, len(prompts))
    return [
        Request(index, prompt, key, limit)
        for index, (prompt, key, limit) in enumerate(zip(prompts, keys, limits, strict=True))
    ]


def _check(index: int, prompt: Sequence[int], limit: int, vocab_size: int, context: int | None) -> None:
    if len(prompt) == 0:
        raise ValueError(f"Prompt {index} is empty: a prompt needs at least 1 token, such as the BOS token.")
    strange = [kind for kind in set(map(type, prompt)) if kind is bool or not issubclass(kind, Integral)]
    if strange:
        token = next(token for token in prompt if type(token) in strange)
        raise ValueError(f"Prompt {index} has {token!r} among its token ids: they must be integers.")
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= vocab_size:
        token = low if low < 0 else high
        raise ValueError(
            f"Prompt {index} has token id {token}, outside the vocabulary of {vocab_size} tokens (0 to "
            f"{vocab_size - 1}): is it tokenized with this policy's tokenizer?"
        )
    if isinstance(limit, bool) or not isinstance(limit, Integral):
        raise ValueError(f"max_new_tokens={limit!r} of prompt {index} is of the wrong type: it must be an integer.")
    if limit < 1:
        raise ValueError(f"max_new_tokens={limit} of prompt {index} is out of range: it must be at least 1.")
    if context is not None and len(prompt) + limit > context:
        raise ValueError(
            f"Prompt {index} has {len(prompt)} tokens; with max_new_tokens={limit} it exceeds the policy's context of "
            f"{context} tokens: shorten the prompt or lower max_new_tokens to {max(context - len(prompt), 0)}."
        )


def _check_side(switch: int, lengths: list[int], limit: int) -> None:
    """All rows, and the batch that a trainer makes of them, must lie on one side of `switch` tokens throughout; a
    prompt's last token is read apart from the rest."""
    if max(lengths) + limit <= switch or min(lengths) - 1 > switch:
        return
    raise ValueError(
        f"The policy's rope (rope_type='longrope') reads all positions of a pass otherwise once one lies beyond "
        f"{switch} tokens, so a token would depend on guesses and on other rows: prompts have {min(lengths)} to "
        f"{max(lengths)} tokens, and up to {limit} new ones. Keep the longest prompt and max_new_tokens within "
        f"{switch} together, or sample prompts of more than {switch + 1} tokens apart from the others."
    )
