"""A policy with recurrent layers in vLLM: as many guesses in each step, and no prefix caching.

vLLM 0.31 loses the states of such layers where a step guesses more or fewer tokens than the one before (vllm #39273),
and ends with an error on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from spec_rollout.backends.vllm.engine import MTP, SCHEDULE
from spec_rollout.config import SpecConfig
from spec_rollout.draft.eagle import EagleHead
from spec_rollout.draft.mtp import MtpHead
from spec_rollout.engine.support import has_recurrent_layers

GATED = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
"""Model types whose delta rule vLLM computes in bfloat16 alone on a CPU."""
STEADY = 3
"""Guesses of every step, where their number must not change and none was asked for."""

logger = logging.getLogger(__name__)


def guesses_steadily(speculative: dict[str, Any] | None) -> bool:
    """Whether a vLLM of that speculative_config guesses as many tokens in each step, as a policy with recurrent layers
    needs; prefix caching must then be off."""
    return speculative is not None and speculative["method"] == MTP and not speculative.get(SCHEDULE)


def room(speculative: dict[str, Any] | None, longest: int) -> int | None:
    """Tokens that a prompt and its completion may have in a context of `longest` tokens, where the number of guesses
    must not change: at the context's end vLLM guesses fewer. None where it may."""
    return longest - speculative["num_speculative_tokens"] if guesses_steadily(speculative) else None


def step_tokens(speculative: dict[str, Any] | None, rows: int) -> int:
    """Tokens of a step in which `rows` rows guess as many as they must; 0 where their number may change."""
    return rows * (1 + speculative["num_speculative_tokens"]) if guesses_steadily(speculative) else 0


def refuse_crowded(speculative: dict[str, Any] | None, rows: int, most: int) -> None:
    """
    Args:
        rows: that are decoded at the same time.
        most: tokens that vLLM takes in one step (its max_num_batched_tokens).

    Raises:
        ValueError: a step has no room for all guesses, so that vLLM would verify fewer of a row than in other steps.
    """
    needed = step_tokens(speculative, rows)
    if needed > most:
        raise ValueError(
            f"{rows} rows with {needed // rows - 1} guesses each are {needed} tokens, but vLLM takes {most} in one: "
            "it would guess fewer for some row, and lose the states of recurrent layers: lower max_slots or "
            "num_speculative_tokens, or raise max_num_batched_tokens (a server's --max-num-batched-tokens)."
        )


def refuse_precision(kind: str, dtype: str, on_cpu: bool) -> None:
    """
    Args:
        kind: the policy's model type.
        dtype: what vLLM would compute in.

    Raises:
        ValueError: vLLM would end at its first token.
    """
    if on_cpu and kind in GATED and dtype != "bfloat16":
        raise ValueError(
            f"vLLM computes the delta rule of {kind!r} in bfloat16 alone on a CPU, not in {dtype}: set bf16=True (a "
            "server's --dtype bfloat16), or sample with rollout_backend='embedded'."
        )


def refuse_unsteady(prompts: Sequence[Sequence[int]], bounds: Sequence[int], most: int | None) -> None:
    """
    Args:
        bounds: of each prompt's new tokens.
        most: what `room` gave; None refuses nothing.

    Raises:
        ValueError: a prompt beside which vLLM would guess more or fewer tokens than in other steps.
    """
    if most is None:
        return
    for i, (prompt, bound) in enumerate(zip(prompts, bounds, strict=True)):
        if len(prompt) == 1:
            raise ValueError(
                f"Prompt {i} is a single token. Where such a one comes while other rows guess, vLLM 0.31 takes it for "
                "one that guesses too, and reads the state of a row that has ended: give prompts of at least two "
                "tokens, such as with a chat template, or set num_speculative_tokens=0."
            )
        if len(prompt) + bound > most:
            raise ValueError(
                f"Prompt {i} of {len(prompt)} tokens with {bound} new ones is longer than {most} tokens. Behind those "
                "vLLM, at the end of its context, guesses fewer tokens and loses the states of recurrent layers: ask "
                "for fewer new tokens or shorter prompts, or raise vllm_max_model_length (a server's --max-model-len)."
            )


def kept_free(model: nn.Module, config: SpecConfig, served: bool) -> int:
    """Tokens at the end of the policy's context that no prompt or completion may reach, as `room` says; on a server
    that may guess any number, for the largest."""
    if not has_recurrent_layers(model, model.config.get_text_config(decoder=True)):
        return 0
    return config.widest if served else _number(config)


def _number(config: SpecConfig) -> int:
    return min(STEADY, config.widest) if config.num_speculative_tokens is None else config.num_speculative_tokens


def steady_number(model: nn.Module, head: EagleHead | MtpHead, config: SpecConfig) -> int | None:
    """How many tokens each step guesses, where that must not change; None where it may.

    An EAGLE-3 head does not guess until it has learned, so that the number would change.

    Raises:
        ValueError: `model` has recurrent layers, and the head is no MTP head.
    """
    if not has_recurrent_layers(model, model.config.get_text_config(decoder=True)):
        return None
    if not isinstance(head, MtpHead):
        raise ValueError(
            f"{type(model).__name__} has recurrent layers, whose states vLLM loses where the number of guesses "
            "changes from step to step, so that it takes no EAGLE-3 head: set num_speculative_tokens=0, give a policy "
            "whose checkpoint has an MTP head that vLLM takes, or sample with rollout_backend='embedded'."
        )
    number = _number(config)
    logger.warning(
        "%s has recurrent layers: vLLM guesses with its MTP head as many tokens in each step, and caches no prefixes "
        "(in the trainer's process num_speculative_tokens=%d; a server as many as it was started with).",
        type(model).__name__,
        number,
    )
    return number
