"""Prompts that leave no room for `max_completion_length` in the policy's context: refused, clipped or skipped."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import Trainer

from spec_rollout.backends.vllm.steady import kept_free
from spec_rollout.engine.virtual_tokens import virtual_tokens
from spec_rollout.records import SamplingParams
from spec_rollout.training.sampling_params import trainer_params

logger = logging.getLogger(__name__)

REFUSE, CLIP, SKIP = OVERLONG = ["refuse", "clip", "skip"]
BATCH = 1000
"""Prompts that are tokenized together when a dataset is looked through."""

Tokenize = Callable[[list], tuple[list[list[int]], Any, dict]]


def context_of(trainer: Trainer) -> int | None:
    """Tokens that prompt and completion may have together; None without a bound."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    own = getattr(policy.config.get_text_config(decoder=True), "max_position_embeddings", None)
    bounds = [own]
    if getattr(trainer.args, "rollout_backend", "embedded") == "vllm":
        # Behind a row vLLM guesses on, of a policy with recurrent layers as many tokens as ever.
        free = kept_free(policy, trainer.args, trainer.args.vllm_mode == "server")
        bounds = [own and own - free, trainer.args.vllm_max_model_length]
    return min((bound - virtual_tokens(policy) for bound in bounds if bound is not None), default=None)


def within_context(prompts: Sequence[Sequence[int]], params: SamplingParams, context: int | None) -> list[int] | None:
    """For each of `prompts` as many new tokens as `context` leaves, at least one; None without a bound."""
    if context is None:
        return None
    return [max(1, min(params.max_new_tokens, context - len(prompt))) for prompt in prompts]


def fit_prompts(trainer: Trainer, prompt_ids: list[list[int]], overlong: str) -> list[list[int]]:
    """`prompt_ids`, of which those that are too long have lost their beginning if `overlong` is "clip".

    Raises:
        ValueError: a prompt is too long, and not to be clipped.
    """
    context = context_of(trainer)
    if context is None:
        return prompt_ids
    new = trainer_params(trainer).max_new_tokens
    room = context - new
    long = next((i for i, ids in enumerate(prompt_ids) if len(ids) > room), None)
    if long is None:
        return prompt_ids
    if room < 1:
        raise ValueError(
            f"max_completion_length={new} leaves no room for a prompt in the policy's context of {context} tokens: "
            f"lower it to less than {context}."
        )
    if overlong == CLIP:
        warnings.warn(
            f"Prompts of more than {room} tokens lose their beginning (overlong_prompts='clip').", stacklevel=2
        )
        return [ids[-room:] for ids in prompt_ids]
    size = len(prompt_ids[long])
    raise ValueError(
        f"Prompt {long} of the batch has {size} tokens; with max_completion_length={new} it exceeds the policy's "
        f"context of {context} tokens. Set overlong_prompts='clip' to keep the last {room} tokens of such prompts, or "
        "'skip' to leave them out of the datasets; or shorten the prompt, or lower max_completion_length"
        f"{f' to {context - size}' if size < context else ''}."
    )


def skip_overlong(trainer: Trainer, tokenize: Tokenize) -> None:
    """Leave prompts that are too long out of the trainer's datasets; `tokenize` is TRL's.

    Raises:
        ValueError: prompts that are known only when an environment starts, or none that fits.
    """
    context = context_of(trainer)
    if context is None:
        return
    if getattr(trainer, "environment_factories", None) is not None:
        raise ValueError(
            "overlong_prompts='skip' reads the prompts before training, but environments write theirs when they "
            "start: set it to 'clip' or 'refuse'."
        )
    room = context - trainer_params(trainer).max_new_tokens
    for name in ("train_dataset", "eval_dataset"):
        dataset = getattr(trainer, name)
        if isinstance(dataset, dict):
            setattr(trainer, name, {key: _shortened(part, key, tokenize, room) for key, part in dataset.items()})
        elif dataset is not None:
            setattr(trainer, name, _shortened(dataset, name, tokenize, room))


def _shortened(dataset: Dataset | IterableDataset, name: str, tokenize: Tokenize, room: int):
    def fits(prompts: Sequence) -> list[bool]:
        return [len(ids) <= room for ids in tokenize(list(prompts))[0]]

    if isinstance(dataset, IterableDataset):
        return dataset.filter(lambda rows: fits(rows["prompt"]), batched=True)
    kept = [fit for rows in dataset.select_columns("prompt").iter(BATCH) for fit in fits(rows["prompt"])]
    if not any(kept):
        raise ValueError(
            f"No prompt of {name} has {room} tokens or fewer, which is what max_completion_length leaves of the "
            "policy's context: lower max_completion_length, or set overlong_prompts='clip'."
        )
    if all(kept):
        return dataset
    logger.warning("overlong_prompts='skip' leaves %d of %d prompts out of %s.", kept.count(False), len(kept), name)
    return dataset.select([i for i, fit in enumerate(kept) if fit])
