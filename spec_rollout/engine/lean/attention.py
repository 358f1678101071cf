"""Attention of the lean pass: a few queries per row over grouped keys, in buffers that are made once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spec_rollout.engine.lean.products import columns_like
from spec_rollout.engine.lean.rope import Angles
from spec_rollout.engine.lean.views import LayerBuffers
from spec_rollout.engine.masks import causal_mask

SHAPES = 64
"""Pass shapes whose views are kept."""


class Attentions:
    """One `Attention` for each pass shape that occurs; all lie in the same buffers, as large as the largest needs."""

    def __init__(self, heads: tuple[int, int, int], like: Tensor, reads: tuple[int, ...], columns: bool):
        self.heads, self.like, self.reads, self.columns = heads, like, reads, columns
        self._tokens = 0
        self._shapes: dict[tuple[int, int], Attention] = {}

    def of(self, rows: int, width: int) -> Attention:
        """That of passes over `rows` rows of `width` tokens."""
        found = self._shapes.get((rows, width))
        if found is None:
            if rows * width > self._tokens:
                self._grow(rows * width)
            elif len(self._shapes) == SHAPES:
                self._shapes.pop(next(iter(self._shapes)))
            found = self._shapes[rows, width] = self._made(rows, width)
        return found

    def _grow(self, tokens: int) -> None:
        self._tokens = tokens
        self._shapes.clear()
        widths = (*buffer_widths(self.heads), *self.reads)
        self._buffers = [self.like.new_empty(tokens * width) for width in widths]

    def _made(self, rows: int, width: int) -> Attention:
        return Attention(rows, width, self.heads, self._buffers, self.reads, self.columns)


def buffer_widths(heads: tuple[int, int, int]) -> tuple[int, ...]:
    """Numbers per token in the buffers of an `Attention`: projected, rotated, as the kernel reads them, its output."""
    queries, keys, size = heads
    return (queries + 2 * keys) * size, (queries + keys) * size, queries * size, queries * size


def mask_of(
    positions: Tensor,
    extent: int,
    window: int | None,
    groups: int,
    zero: Tensor | float = 0.0,
    never: Tensor | float = -torch.inf,
) -> Tensor:
    """What is added to scores, [B, 1, T · G, extent], for tokens at `positions` [B, T]: `zero` where they see."""
    each = positions if groups == 1 else positions.repeat_interleave(groups, 1)
    return torch.where(causal_mask(each, extent, window), zero, never)


class Attention:
    """For passes of `rows` rows of `width` tokens each, N in all, with `heads` (Hq, Hk, D) in each layer.

    `parts` are the places of queries, keys and values, [N, heads · D] each, side by side in `whole`
    [N, (Hq + 2 Hk) · D]: projections write into them, then `attend` reads them. `queries_keys` [N, Hq + Hk, D] are
    the first two, for norms. `reads` are buffers [N, n], for each of the numbers `reads`, for what other projections
    read. Every layer overwrites what the one before left.

    With `columns` (see `products`) `whole`, `parts`, `reads` and the output are [n, N].
    """

    def __init__(
        self,
        rows: int,
        width: int,
        heads: tuple[int, int, int],
        buffers: list[Tensor],
        reads: tuple[int, ...],
        columns: bool,
    ):
        queries, keys, size = heads
        count, groups, half = rows * width, queries // keys, size // 2
        self.groups = groups
        widths = (*buffer_widths(heads), *reads)
        whole, turned, query, output, *others = (b[: count * w] for b, w in zip(buffers, widths, strict=True))
        self.whole = whole.view(-1, count) if columns else whole.view(count, -1)
        self.parts = self.whole.split([queries * size, keys * size, keys * size], 0 if columns else 1)
        self.reads = [columns_like(other, count) if columns else other.view(count, -1) for other in others]
        by_head = _operand(self.whole, columns).view(count, -1, size)
        self.queries_keys, self.values = by_head[:, : queries + keys], by_head[:, queries + keys :]
        turned = turned.view(count, queries + keys, size)
        self._turned = turned, turned[..., :half], turned[..., half:]
        self._halves = self.queries_keys[..., :half], self.queries_keys[..., half:]
        by_group = (rows, width, keys, groups, size)
        self._unturned = self.queries_keys[:, :queries].view(by_group), self.queries_keys[:, queries:]
        self._ready = turned[:, :queries].view(by_group), turned[:, queries:]
        query = query.view(rows, keys, width, groups, size)
        self._query, self._query_places = query.flatten(2, 3), query.transpose(1, 2)
        self._split_output = (rows, keys, width, groups, size)
        self._output = _operand(output.view(count, queries * size), columns)
        self._output_places = output.view(by_group)
        self.zero, self.never = output.new_zeros(()), output.new_full((), -torch.inf)

    def mask(self, positions: Tensor, extent: int, window: int | None) -> Tensor:
        return mask_of(positions, extent, window, self.groups, self.zero, self.never)

    def attend(
        self, angles: Angles | None, mask: Tensor, index: Tensor, buffers: LayerBuffers, scaling: float
    ) -> Tensor:
        """The output [N, Hq · D] (with columns [Hq · D, N]), before its projection, after keys and values were written
        at `index` [N, Hk].

        It lies in a buffer of this object. Without `angles` nothing is rotated.
        """
        query, key = self._unturned if angles is None else self._turn(*angles)
        flat_keys, flat_values, cached_keys, cached_values = buffers
        flat_keys.index_put_((index,), key)
        flat_values.index_put_((index,), self.values)
        self._query_places.copy_(query)
        output = F.scaled_dot_product_attention(self._query, cached_keys, cached_values, mask, scale=scaling)
        self._output_places.copy_(output.view(self._split_output).transpose(1, 2))
        return self._output

    def _turn(self, cos: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        whole, first, second = self._turned
        a, b = self._halves
        if whole.dtype != torch.float32:  # as transformers rounds: each product, then their sum
            swapped = torch.cat([b * low, a * high], -1)
            whole.copy_(self.queries_keys * cos + swapped)
            return self._ready
        torch.mul(self.queries_keys, cos, out=whole)
        first.addcmul_(b, low)
        second.addcmul_(a, high)
        return self._ready


def _operand(tokens: Tensor, columns: bool) -> Tensor:
    """`tokens` [N, n], as [n, N] with columns; and back."""
    return tokens.t() if columns else tokens
