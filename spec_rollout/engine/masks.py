"""Which cache entries a token sees."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from spec_rollout.engine.support import ATTENTION


def masks(
    config: PreTrainedConfig, positions: Tensor, extent: int, dtype: torch.dtype, first: bool = False
) -> Tensor | dict[str, Tensor | None]:
    """For tokens at `positions` [N, T] that attend to the first `extent` entries: one mask for the attention layers,
    or one by kind of layer where there are several; other layers take none, and a model that is given a single mask
    gives them none. [N, 1, T, extent] each, boolean, or for "eager" attention of `dtype`, what is added to scores.
    `first` tells that the tokens are those that their rows begin with."""

    def as_taken(mask: Tensor) -> Tensor:
        if config._attn_implementation != "eager":
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)

    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if not kinds:
        return as_taken(causal_mask(positions, extent, window, first))
    windows = {"sliding_attention": window}
    found: dict[str, Tensor | None] = {}
    for kind in kinds & set(ATTENTION) or {"full_attention"}:
        if kind == "chunked_attention":
            found[kind] = as_taken(chunked_mask(positions, extent, config.attention_chunk_size))
        else:
            found[kind] = as_taken(causal_mask(positions, extent, windows.get(kind), first))
    return found | dict.fromkeys(kinds - set(found)) if len(found) > 1 else next(iter(found.values()))


def causal_mask(positions: Tensor, extent: int, window: int | None = None, first: bool = False) -> Tensor:
    """Boolean [N, 1, T, extent]: a query at `positions` [N, T] sees the entries up to itself, and with `window` only
    the last `window` of them. `first` tells that `positions` are 0..T-1."""
    entry = torch.arange(extent, device=positions.device)
    query = positions[:, None, :, None]
    mask = entry <= query
    if window is not None:
        mask = mask & (entry > query - window)
    if first and (window is None or positions.shape[1] <= window):
        mask.is_triangle = True  # type: ignore[attr-defined]
    return mask


def is_triangle(mask: Tensor | None) -> bool:
    """Whether `mask` is known to let the queries, which are a row's first tokens, see those up to themselves, as
    torch's `is_causal` does: kernels need not read such a mask, and leave out what it hides. What is made of a mask,
    such as a slice, does not tell."""
    return getattr(mask, "is_triangle", False)


def chunked_mask(positions: Tensor, extent: int, size: int) -> Tensor:
    """Boolean [N, 1, T, extent]: a query at `positions` [N, T] sees the entries up to itself of its own chunk; chunks
    are of `size` positions and begin at 0."""
    entry = torch.arange(extent, device=positions.device)
    query = positions[:, None, :, None]
    return (entry <= query) & (entry // size == query // size)
