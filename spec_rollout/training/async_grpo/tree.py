"""Rows that TRL packs into one, with what they begin with in common kept once: where they lie, and their attention
where there is no kernel for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

DENSE = "spec_rollout_tree"
"""Name of `dense_tree_attention` for transformers."""
Packed = dict[str, Tensor]
"""A batch of TRL's collator, of one row."""


def rows_of(batch: Packed) -> list[tuple[Tensor, int]]:
    """Of each sample in `batch` the places [n] of its tokens in the row, in order, and the number of its prompt
    tokens; equal samples count once.

    TRL cuts the row into segments. Each attends to those before it on the way from the root, and a sample is such a
    way to a segment that lies on no other's.
    """
    places, ends = _used(batch["tree_kv_index"]), _used(batch["tree_cu_seqlens_q"])[1:] - 1
    borders = _used(batch["tree_cu_seqlens_k"]).tolist()
    ways = torch.bincount(places, minlength=int(ends[-1]) + 1)
    trained = batch["shift_labels"][0] != -100
    found = []
    for number, end in enumerate(ends.tolist()):
        if ways[end] == 1:
            way = places[borders[number] : borders[number + 1]]
            labelled = trained[way].nonzero()
            if len(labelled):
                found.append((way, int(labelled[0]) + 1))
    return found


def _used(numbers: Tensor) -> Tensor:
    """Without padding."""
    return numbers[numbers >= 0].flatten().long()


def allowed(places: Tensor, borders_q: Tensor, borders_k: Tensor, window: int | None = None) -> Tensor:
    """What each token of a row of N reads, [N, N] bool, from TRL's description of its segments.

    Args:
        window: of the tokens before a token on its way, how many it reads at most, itself included.
    """
    device, tokens = places.device, int(borders_q[-1])
    numbers = torch.arange(len(borders_q) - 1, device=device)
    lengths = borders_k.diff()
    segment = numbers.repeat_interleave(lengths)
    on_way = torch.zeros(len(numbers), tokens, dtype=torch.bool, device=device)
    on_way[segment, places] = True
    seen = on_way[numbers.repeat_interleave(borders_q.diff())].tril()  # what is before a token on its way is before it
    if window is not None:
        depth = torch.zeros(tokens, dtype=torch.long, device=device)
        depth[places] = torch.arange(len(places), device=device) - borders_k[:-1].repeat_interleave(lengths)
        seen &= depth[:, None] - depth < window
    return seen


def dense_tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree_kv_index: Tensor,
    tree_cu_seqlens_q: Tensor,
    tree_cu_seqlens_k: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """TRL's `tree_attention` by torch's own, for devices without its kernel: [1, H, N, D] to [1, N, H, D]. Memory
    grows with the square of the row.

    Raises:
        ValueError: the model caps its attention scores, which torch's attention does not.
    """
    if softcap:
        raise ValueError(f"{type(module).__name__} caps its scores at {softcap}: without a GPU that is not supported.")
    seen = allowed(tree_kv_index, tree_cu_seqlens_q.long(), tree_cu_seqlens_k.long(), sliding_window)
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2), None


def use_dense_attention(model: nn.Module) -> None:
    """Have `model`, which TRL's trainer has loaded, attend without TRL's kernel."""
    AttentionInterface.register(DENSE, dense_tree_attention)
    AttentionMaskInterface.register(DENSE, lambda **given: None)
    model.set_attn_implementation(DENSE)
