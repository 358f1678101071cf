"""Which policies can be decoded on ragged rows: said before anything runs; a probe has the last word."""

from __future__ import annotations

import inspect

from torch import nn

from spec_rollout.engine.lean.recognition import base_model
from spec_rollout.records import UnsupportedModelError

ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
"""Layers whose keys and values are masked per row."""
RECURRENT = ("linear_attention", "conv", "hybrid")
"""Layers with a state; "hybrid" has attention beside it."""
STATELESS = ("moe", "mlp")
KINDS = "the gated or Kimi's delta rule, Mamba-2 and short convolutions"
REMEDY = (
    "Sample it with TRL's own trainer, or use a policy with full, sliding-window or chunked softmax attention, alone "
    f"or beside recurrent layers of {KINDS}."
)


def attention_layers(config) -> int:
    """Layers that keep keys and values."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return sum(kind in (*ATTENTION, "hybrid") for kind in kinds)


def has_recurrent_layers(model: nn.Module, config) -> bool:
    kinds = set(getattr(config, "layer_types", None) or ())
    return bool(kinds & set(RECURRENT)) or getattr(model, "_is_stateful", False)


def refuse_unsupported(model: nn.Module, config, recurrences: bool, compiled: bool) -> None:
    """`recurrences` says whether the model's layers call one that a rollout can follow.

    Raises:
        UnsupportedModelError: the model has layers whose state cannot be masked or rolled back per row.
        ValueError: it can only be decoded without `compiled`.
    """
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; only causal language models are decoded. {REMEDY}")
    kinds = set(getattr(config, "layer_types", None) or ())
    foreign = sorted(kinds - {*ATTENTION, *RECURRENT, *STATELESS})
    if foreign:
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(map(repr, foreign))}, which cannot be masked per row. {REMEDY}"
        )
    _refuse_scaled_attention(name, config)
    if not has_recurrent_layers(model, config):
        return
    if not recurrences and "conv" not in kinds:
        of = f" in its layers of type {', '.join(map(repr, sorted(kinds & set(RECURRENT))))}" if kinds else ""
        raise UnsupportedModelError(f"{name} keeps a recurrent state{of} that cannot be rolled back. {REMEDY}")
    if compiled:
        raise ValueError(
            f"compile_passes=True: {name} has recurrent layers, whose passes are not compiled. "
            "Set compile_passes=False."
        )


def _refuse_scaled_attention(name: str, config) -> None:
    """Llama 4 scales queries by their place in the pass, not in the row, from `floor_scale` tokens on."""
    context, floor = getattr(config, "max_position_embeddings", None) or 0, getattr(config, "floor_scale", None) or 0
    if getattr(config, "attn_temperature_tuning", False) and context >= floor:
        raise UnsupportedModelError(
            f"{name} scales its attention by a position that all rows of a pass share (attn_temperature_tuning, "
            f"from {floor} tokens on; max_position_embeddings={context}). Set max_position_embeddings below {floor}. "
            f"{REMEDY}"
        )


def rope_switches(config) -> tuple[int, ...]:
    """The numbers of tokens beyond which a pass of the model reads all of its positions by other factors."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(entry for entry in parameters.values() if isinstance(entry, dict))]
    switching = [kind for kind in kinds if kind.get("rope_type") == "longrope"]
    return tuple(sorted({kind["original_max_position_embeddings"] for kind in switching}))


def cache_argument(model: nn.Module) -> str:
    """How the model's forward calls the cache: "cache", or before transformers 5.24 "past_key_values" ("cache_params"
    where it has no attention)."""
    taken = inspect.signature(type(base_model(model)).forward).parameters  # PEFT's own takes anything
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in taken), "past_key_values")
