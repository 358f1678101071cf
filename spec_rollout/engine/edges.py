"""The edges of top-k, top-p and min-p: which tokens rounding could carry across them, and whether a sample minds."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from spec_rollout.engine.gumbel_max import block_size, block_sums, inside, num_blocks
from spec_rollout.records import SamplingParams

SUM_ERROR = 1e-6
"""Of a sum of probabilities."""
DOUBT = 1 / 8
"""A token that crosses an edge changes the log-probs of the others too. That costs no token, so it is looked for
within this part of the bound only: 2.5e-5, several times what float32 rounds by. Else a flat distribution, in which
some token is always near an edge, would be settled at every tenth position."""


class Edges(NamedTuple):
    """Scores above `sure` are kept whatever rounding does, scores below `possible` never are. `doubt` is the weight of
    what may or may not be kept, as a share of all that is. Each [..., 1]."""

    sure: Tensor
    possible: Tensor
    doubt: Tensor


def edges(z: Tensor, params: SamplingParams, bound: Tensor) -> Edges:
    """The edges of the filters over scores z [..., V] before any of them, where two scores may come closer to each
    other, or farther, by `bound` [...]."""
    bound = bound[..., None]
    size = z.shape[-1]
    kept = min(params.top_k or size, size)
    if params.top_p < 1 and kept == size:
        ranked = z.sort(-1, descending=True).values
    else:
        ranked = z.topk(min(max(kept + 1 if kept < size else 2, 2), size)).values
    nothing = torch.zeros_like(bound)
    found = [Edges(nothing - torch.inf, nothing - torch.inf, nothing)]
    tie = close_tie = nothing
    if kept < size:
        last, out = ranked[..., kept - 1, None], ranked[..., kept, None]
        weight = ranked[..., :kept].softmax(-1)[..., -1:]
        tie = torch.where(last - out <= bound, weight, nothing).masked_fill(last == out, torch.inf)
        close_tie = torch.where(last - out <= DOUBT * bound, weight, nothing)
        found.append(Edges(out + bound, last - bound, close_tie))  # top-k keeps all that equal its last
    if params.top_p < 1:
        found.append(_top_p(ranked[..., :kept], params.top_p, bound, tie, close_tie))
    if params.min_p > 0:
        found.append(_min_p(z, ranked, params.min_p, bound))
    sure, possible, doubt = (torch.stack(parts) for parts in zip(*found, strict=True))
    return Edges(sure.amax(0), possible.amax(0), doubt.sum(0))


def _top_p(ranked: Tensor, top_p: float, bound: Tensor, tie: Tensor, close_tie: Tensor) -> Edges:
    """Of `ranked` [..., n], the scores that top-p is given, best first; by `tie` [..., 1] their weights may be off in
    sum. A token is kept while it and the worse ones weigh more than 1 - top_p; the best one always is."""
    rest = ranked.softmax(-1).flip(-1).cumsum(-1).flip(-1)
    last = ranked.shape[-1] - 1

    def count(off: Tensor) -> Tensor:
        return (rest > 1 - top_p + off).sum(-1, keepdim=True).clamp(min=1)

    off = (1 - top_p) * bound + SUM_ERROR + tie
    strict, lenient = count(off), count(-off)
    out = torch.where(strict > last, -torch.inf, ranked.gather(-1, strict.clamp(max=last)))
    off = (1 - top_p) * DOUBT * bound + SUM_ERROR + close_tie
    few, many = (torch.where(n > last, 0.0, rest.gather(-1, n.clamp(max=last))) for n in (count(off), count(-off)))
    return Edges(out + bound, ranked.gather(-1, lenient - 1) - bound, (few - many) / top_p)


def _min_p(z: Tensor, ranked: Tensor, min_p: float, bound: Tensor) -> Edges:
    """A token is kept whose score is at most -log(min_p) below the best; the best one always is."""
    best = ranked[..., :1]
    edge = best + math.log(min_p)
    second = ranked[..., 1:2] if ranked.shape[-1] > 1 else torch.full_like(edge, -torch.inf)
    alone = -math.log(min_p) < bound  # only the best itself can be sure, by its lead over the second
    near = ((z - edge).abs() <= DOUBT * bound).sum(-1, keepdim=True) - (edge == best).long()
    doubt = near * (edge - z.masked_fill(z < edge, -torch.inf).logsumexp(-1, keepdim=True)).exp()
    return Edges(torch.where(alone, second, edge) + bound, edge - bound, doubt)


def lead(z: Tensor, noise: Tensor, samples: Tensor, edges: Edges, bound: Tensor) -> Tensor:
    """The least lead [...] of `samples` [...] over what may be drawn in their place from z [..., V] by `noise`, with
    every doubtful token kept where it helps another and thrown away where it helps the sample. -inf where the weight
    of what is kept is in doubt by more than `bound`, and with it the sample's log-probability."""
    size, count = block_size(z.shape[-1]), num_blocks(z.shape[-1])
    most = z.masked_fill(z < edges.possible, -torch.inf)
    least = z.masked_fill(z <= edges.sure, -torch.inf)
    most_sums, least_sums = block_sums(most, size), block_sums(least, size)
    block, at = (samples // size)[..., None], samples[..., None]
    rivals = (most_sums + noise[..., :count]).scatter(-1, block, -torch.inf).amax(-1)
    between = (least_sums + noise[..., :count]).gather(-1, block)[..., 0] - rivals
    place = at - block * size
    scores = inside(most, block[..., 0], size) + noise[..., count:]
    mine = least.gather(-1, at) + noise[..., count:].gather(-1, place)
    within = (mine - scores.scatter(-1, place, -torch.inf).amax(-1, keepdim=True))[..., 0]
    found = torch.minimum(between, within).masked_fill_(~(edges.doubt[..., 0] <= bound), -torch.inf)
    return found.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
