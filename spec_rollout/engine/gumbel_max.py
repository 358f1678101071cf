"""Exact samples of softmax(z) from a fixed handful of Gumbel noise: first a block of the vocabulary, then its token.

The largest of z[v] + G[v] over the tokens v of a block is itself Gumbel-distributed around the logsumexp of the
block's z, and independent of it is which token it belongs to (Maddison et al., "A* sampling", 2014). So

    block = argmax_b logsumexp(z[block b]) + G[b],    token = argmax_j z[block, j] + G'[j]

follows softmax(z) exactly. It takes one number per block and one per place in a block, 2 √V in place of V; and since
the numbers are there before z is, two distributions that are close choose the same token nearly as often as with V.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = -80.0
"""A score this far below the best cannot win, with noise between -2.9 and 22.2; its weight counts as exp(FLOOR), since
exponentials of less can take ten times as long."""


def block_size(vocab_size: int) -> int:
    """Tokens of a block; the last one may have fewer."""
    return math.isqrt(vocab_size - 1) + 1


def num_blocks(vocab_size: int) -> int:
    return -(-vocab_size // block_size(vocab_size))


def noise_width(vocab_size: int) -> int:
    """Numbers per sample: the blocks' first, then those of the places in a block."""
    return num_blocks(vocab_size) + block_size(vocab_size)


def draw(z: Tensor, noise: Tensor | None, room: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A sample of softmax(z), the best score if there is no noise.

    Args:
        z: [..., V], of any precision.
        noise: [..., noise_width(V)] float32, or None.
        room: [..., V] float32 to compute in; new memory takes a CPU longer than the arithmetic.

    Returns:
        the sample [...] int64; the least score by which it won in either stage [...]; logsumexp(z) [...] float32. Of
        two equal scores the lower id wins, as in transformers' argmax.
    """
    size, count = block_size(z.shape[-1]), num_blocks(z.shape[-1])
    sums = block_sums(z, size, room)
    if noise is None:
        return *_best(z), sums.logsumexp(-1)
    block, won = _best(sums + noise[..., :count])
    place, margin = _best(inside(z, block, size) + noise[..., count:])
    return block * size + place, torch.minimum(won, margin), sums.logsumexp(-1)


def draw_among(z: Tensor, noise: Tensor | None, ids: Tensor | None, vocab_size: int) -> Tensor:
    """A sample by the noise [B, noise_width(vocab_size)] of columns z [B, N] that stand for the tokens `ids`, [N] or
    [B, N], alone (None is the whole vocabulary): indices [B] into them."""
    if noise is None:
        return z.argmax(-1)
    size, count = block_size(vocab_size), num_blocks(vocab_size)
    if ids is None:  # as `draw` does, without what the target alone needs, and in few operations
        blocks = F.pad(z.float(), (0, count * size - z.shape[1]), value=-torch.inf).view(-1, count, size)
        block = (blocks.logsumexp(-1) + noise[:, :count]).argmax(-1)
        place = (blocks[torch.arange(len(z), device=z.device), block] + noise[:, count:]).argmax(-1)
        return place.add_(block, alpha=size)
    block_of, place = (index.expand_as(z) for index in (ids // size, ids % size + count))
    sums = z.new_zeros(len(z), count).scatter_add_(1, block_of, _weights(z)[0])
    block = (sums.log_() + noise[:, :count]).argmax(-1, keepdim=True)
    return (z + noise.gather(1, place)).masked_fill_(block_of != block, -torch.inf).argmax(-1)


def inside(z: Tensor, block: Tensor, size: int) -> Tensor:
    """z [..., size] of the tokens in `block` [...]; -inf beyond the vocabulary."""
    ids = block[..., None] * size + torch.arange(size, device=z.device)
    return z.gather(-1, ids.clamp(max=z.shape[-1] - 1)).masked_fill_(ids >= z.shape[-1], -torch.inf)


def _best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the best of `scores` [..., N], the lower one of two equals, and its lead over the second."""
    if scores.shape[-1] == 1:
        return torch.zeros_like(scores[..., 0], dtype=torch.int64), torch.full_like(scores[..., 0], torch.inf)
    best, index = scores.topk(2, dim=-1)
    margin = best[..., 0].float() - best[..., 1].float()
    return torch.where(margin == 0, index.amin(-1), index[..., 0]), margin


def block_sums(z: Tensor, size: int, room: Tensor | None = None) -> Tensor:
    """logsumexp [..., blocks] of z [..., V] over blocks of `size`, where it is not far below the best score."""
    weights, best = _weights(z, room)
    whole = z.shape[-1] // size * size
    sums = weights[..., :whole].unflatten(-1, (-1, size)).sum(-1)
    if whole < z.shape[-1]:
        sums = torch.cat([sums, weights[..., whole:].sum(-1, keepdim=True)], -1)
    return sums.log_().add_(best)


def _weights(z: Tensor, room: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """exp(z - best) [..., V], and best [..., 1]; float32 both."""
    weights = z.to(torch.float32, copy=True) if room is None else room.copy_(z)
    best = weights.amax(-1, keepdim=True)
    return weights.sub_(best).clamp_(min=FLOOR).exp_(), best
