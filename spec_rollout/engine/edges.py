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


class Edges(NamedTuple):
    """Scores above `sure` are kept whatever rounding does, scores below `possible` never are. `fixed` says that the
    kept tokens have one total weight, whichever they are. Each [..., 1]."""

    sure: Tensor
    possible: Tensor
    fixed: Tensor


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
    everything = torch.full_like(bound, -torch.inf)
    found, tie = [Edges(everything, everything, bound >= 0)], torch.zeros_like(bound)
    if kept < size:
        last, first_out = ranked[..., kept - 1, None], ranked[..., kept, None]
        clear = last - first_out > bound  # else they may come out equal, and top-k keeps all equals of its last
        found.append(Edges(first_out + bound, last - bound, clear))
        weight = ranked[..., :kept].softmax(-1)[..., -1:]
        tie = torch.where(last == first_out, torch.inf, torch.where(clear, 0.0, weight))
    if params.top_p < 1:
        found.append(_top_p(ranked[..., :kept], params.top_p, bound, tie))
    if params.min_p > 0:
        found.append(_min_p(ranked, params.min_p, bound))
    sure, possible, fixed = (torch.stack(parts) for parts in zip(*found, strict=True))
    return Edges(sure.amax(0), possible.amax(0), fixed.all(0))


def _top_p(ranked: Tensor, top_p: float, bound: Tensor, tie: Tensor) -> Edges:
    """Of `ranked` [..., n], the scores that top-p is given, best first; by `tie` [..., 1] their weights may be off in
    sum. A token is kept while it and the worse ones weigh more than 1 - top_p; the best one always is."""
    rest = ranked.softmax(-1).flip(-1).cumsum(-1).flip(-1)
    off = (1 - top_p) * bound + SUM_ERROR + tie
    strict = (rest > 1 - top_p + off).sum(-1, keepdim=True).clamp(min=1)
    lenient = (rest > 1 - top_p - off).sum(-1, keepdim=True).clamp(min=1)
    last = ranked.shape[-1] - 1
    out = torch.where(strict > last, -torch.inf, ranked.gather(-1, strict.clamp(max=last)))
    return Edges(out + bound, ranked.gather(-1, lenient - 1) - bound, strict == lenient)


def _min_p(ranked: Tensor, min_p: float, bound: Tensor) -> Edges:
    """A token is kept whose score is at most -log(min_p) below the best; the best one always is."""
    edge = ranked[..., :1] + math.log(min_p)
    second = ranked[..., 1:2] if ranked.shape[-1] > 1 else torch.full_like(edge, -torch.inf)
    alone = -math.log(min_p) < bound  # only the best itself can be sure, by its lead over the second
    return Edges(torch.where(alone, second, edge) + bound, edge - bound, bound < 0)


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
    doubt = most_sums.logsumexp(-1) - least_sums.logsumexp(-1)
    found = torch.minimum(between, within).masked_fill_(~edges.fixed[..., 0] & ~(doubt <= bound), -torch.inf)
    return found.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
