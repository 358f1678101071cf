"""From transformers' generation options to `SamplingParams`: every option is honoured or refused, none is ignored."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from transformers import GenerationConfig, Trainer

from spec_rollout.records import SamplingParams
from spec_rollout.training.option_types import check_type

logger = logging.getLogger(__name__)

HONOURED = {
    "do_sample",
    "eos_token_id",
    "max_new_tokens",
    "min_p",
    "repetition_penalty",
    "stop_strings",
    "temperature",
    "top_k",
    "top_p",
}

HARMLESS = {
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "decoder_start_token_id",
    "disable_compile",
    "low_memory",
    "max_cache_len",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "prefill_chunk_size",
    "renormalize_logits",
    "return_dict_in_generate",
    "transformers_version",
    "use_cache",
}
"""How keys and values are held, how a pass is compiled, what is returned: none of it changes a token."""

MOOT = {
    "assistant_confidence_threshold",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "diversity_penalty",
    "early_stopping",
    "length_penalty",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "target_lookbehind",
}
"""Means something only beside an option that is refused: beams, an assistant."""

REMEDIES = {
    "max_length": "give max_new_tokens (TRL's max_completion_length), which does not count the prompt",
    "prompt_lookup_num_tokens": "the draft takes its place; see num_speculative_tokens",
    "assistant_early_exit": "the draft takes its place; see num_speculative_tokens",
    "speculation_type": "the draft takes its place; see num_speculative_tokens",
    "use_mtp": "the draft takes its place; see num_speculative_tokens",
    "num_return_sequences": "give num_generations, which repeats the prompts",
}
REMEDY = "remove it from generation_kwargs, or sample with TRL's own trainer"
OF_THE_POLICY = (
    "set model.generation_config.{name} = None (it came with the checkpoint), or sample with TRL's own trainer"
)


def trainer_params(trainer: Trainer) -> SamplingParams:
    """The sampling parameters that a trainer's options come to.

    Raises:
        ValueError: an option that cannot be honoured.
    """
    return sampling_params(trainer.generation_config, _own_config(trainer), trainer.eos_token_ids)


def log_inherited(trainer: Trainer) -> None:
    """Say which settings of the checkpoint's generation_config change what is sampled, as `generate` lets them."""
    found = inherited(trainer.generation_config, _own_config(trainer))
    ends = sorted(set(trainer.eos_token_ids) - {trainer._tokenizer.eos_token_id})
    found |= {"eos_token_id": ends} if ends else {}
    if found and trainer.is_world_process_zero():
        settings = ", ".join(f"{name}={value!r}" for name, value in found.items())
        logger.warning("Sampling follows these settings of the policy's generation_config too: %s.", settings)


def _own_config(trainer: Trainer) -> GenerationConfig | None:
    return getattr(trainer.accelerator.unwrap_model(trainer.model), "generation_config", None)


def sampling_params(
    given: GenerationConfig, model_config: GenerationConfig | None = None, eos_token_ids: Iterable[int] = ()
) -> SamplingParams:
    """What `given` asks for, resolved as `generate` resolves it: unset options come from the policy's `model_config`,
    then from transformers' defaults.

    Args:
        given: the trainer's generation config.
        model_config: the policy's own.
        eos_token_ids: ids that end a completion besides those of the options.

    Raises:
        ValueError: an option that the engine cannot honour, naming its value and the remedy.
    """
    options = _resolve(given, model_config)
    if options.get("max_new_tokens") is None:
        raise ValueError("max_new_tokens is not set: give max_completion_length a number of tokens, at least 1.")
    check_option_types(options)
    sampled = options["do_sample"]
    return SamplingParams(
        max_new_tokens=int(options["max_new_tokens"]),
        temperature=float(options["temperature"]) if sampled else 0.0,
        top_k=int(options["top_k"]) if sampled else 0,
        top_p=float(options["top_p"]) if sampled else 1.0,
        min_p=float(options.get("min_p") or 0.0) if sampled else 0.0,
        repetition_penalty=float(options["repetition_penalty"]),
        eos_token_ids=tuple(sorted({*_as_list(options.get("eos_token_id")), *eos_token_ids})),
        stop_strings=tuple(_as_list(options.get("stop_strings"))),
    )


def inherited(given: GenerationConfig, model_config: GenerationConfig | None) -> dict[str, Any]:
    """The options that change tokens and come from the policy's `model_config`, because `given` leaves them open."""
    defaults = GenerationConfig._get_default_generation_params()
    own = {name: value for name, value in _own_options(model_config).items() if name not in _set_options(given)}
    return {name: own[name] for name in sorted(HONOURED & own.keys()) if own[name] != defaults.get(name)}


def check_option_types(options: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: an honoured option is of a wrong type.
    """
    number = float | int
    for name, kind in (
        ("max_new_tokens", int),
        ("temperature", number),
        ("top_k", int),
        ("top_p", number),
        ("min_p", number),
        ("repetition_penalty", number),
        ("do_sample", bool),
    ):
        if options.get(name) is not None:
            check_type(name, options[name], kind)
    for name, of in (("eos_token_id", int), ("stop_strings", str)):
        for value in _as_list(options.get(name)):
            check_type(name, value, of)


def _resolve(given: GenerationConfig, model_config: GenerationConfig | None) -> dict[str, Any]:
    defaults = GenerationConfig._get_default_generation_params()
    neutral = {**defaults, "guidance_scale": 1, "min_new_tokens": 0}
    asked = _set_options(given)
    options = {**_own_options(model_config), **asked}
    for name, value in options.items():
        if name in HONOURED | HARMLESS | MOOT or value is False or value == neutral.get(name):
            continue
        remedy = REMEDIES.get(name, REMEDY) if name in asked else OF_THE_POLICY.format(name=name)
        raise ValueError(f"{name}={value!r} cannot be honoured by speculative rollouts: {remedy}.")
    return {**defaults, **options}


def _own_options(model_config: GenerationConfig | None) -> dict[str, Any]:
    """What `generate` takes from the policy's own configuration; a length that counts the prompt is overruled."""
    known = vars(GenerationConfig()).keys() - {"max_length"}
    return {name: value for name, value in _set_options(model_config).items() if name in known}


def _set_options(config: GenerationConfig | None) -> dict[str, Any]:
    if config is None:
        return {}
    return {name: value for name, value in vars(config).items() if value is not None and not name.startswith("_")}


def _as_list(value: Any) -> list:
    if value is None:
        return []
    if isinstance(value, (str, int, float)):
        return [value]
    return value.tolist() if hasattr(value, "tolist") else list(value)
