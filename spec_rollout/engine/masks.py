"""Which cache entries the policy's own attention layers see."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from spec_rollout.engine.kv_cache import causal_mask, chunked_mask
from spec_rollout.engine.support import ATTENTION


def masks(
    config: PreTrainedConfig, positions: Tensor, extent: int, dtype: torch.dtype
) -> Tensor | dict[str, Tensor | None]:
    """For tokens at `positions` [N, T] that attend to the first `extent` entries: one mask for the attention layers,
    or one by kind of layer where there are several; other layers take none, and a model that is given a single mask
    gives them none. [N, 1, T, extent] each, boolean, or for "eager" attention of `dtype`, what is added to scores."""

    def as_taken(mask: Tensor) -> Tensor:
        if config._attn_implementation != "eager":
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)

    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if not kinds:
        return as_taken(causal_mask(positions, extent, window))
    windows = {"sliding_attention": window}
    found: dict[str, Tensor | None] = {}
    for kind in kinds & set(ATTENTION) or {"full_attention"}:
        if kind == "chunked_attention":
            found[kind] = as_taken(chunked_mask(positions, extent, config.attention_chunk_size))
        else:
            found[kind] = as_taken(causal_mask(positions, extent, windows.get(kind)))
    return found | dict.fromkeys(kinds - set(found)) if len(found) > 1 else next(iter(found.values()))
