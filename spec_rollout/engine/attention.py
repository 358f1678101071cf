"""Attention over the cache as it lies: few queries over grouped keys, and prompts without a mask."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spec_rollout.engine.masks import is_triangle

GROUPED_SDPA = "grouped_sdpa"
"""The `attn_implementation` under which transformers knows `grouped_sdpa`."""


def takes_grouped_sdpa(model: nn.Module) -> bool:
    """Whether `model` lets its attention be replaced."""
    return getattr(model, "_supports_attention_backend", False)


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, without a copy of the keys and values for every query head.

    With a mask, `sdpa` repeats keys and values [N, K, E, D] for the G query heads that share each of them. Here the
    queries [N, K · G, T, D] are read as [N, K, G · T, D], under the mask [N, 1, T, E] repeated G times: the same sums.
    Where that mask has more elements than the copies it saves, as in a long prefill, and wherever heads are not
    grouped, no mask is given or it differs between heads, it is `sdpa` itself. Queries that are their rows' first
    tokens need no mask: torch's kernels then leave out what they do not see.

    Returns the output [N, T, K · G, D] and None in place of the weights.
    """
    rows, heads, width, size = query.shape
    shared = key.shape[1]
    groups = heads // shared
    folds = (
        groups > 1
        and attention_mask is not None
        and attention_mask.shape[1] == 1
        and width <= shared * (size + value.shape[-1])
        and kwargs.get("position_bias") is None
    )
    if is_triangle(attention_mask) and kwargs.get("position_bias") is None:
        return first_sdpa(query, key, value, dropout, scaling).transpose(1, 2).contiguous(), None
    if not folds:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    output = F.scaled_dot_product_attention(
        query.reshape(rows, shared, groups * width, size),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, groups, 1),
        dropout_p=dropout,
        scale=scaling,
    )
    output = output.unflatten(2, (groups, width)).permute(0, 3, 1, 2, 4)  # [N, T, K, G, D]; strides are the kernel's
    return output.reshape(rows, width, heads, -1).contiguous(), None


def first_sdpa(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, scale: float | None = None) -> Tensor:
    """Attention [N, K · G, T, D] of the rows' first tokens `query` to those up to themselves, of `key` and `value`
    [N, K, E, D]. A GPU's fast kernels take as many of these as there are queries. A CPU's takes all of them, and then
    rounds bfloat16 as it does under a mask."""
    if query.device.type != "cpu":
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped
    )


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)
