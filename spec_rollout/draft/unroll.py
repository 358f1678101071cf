"""Training-time test: the head unrolled on its own output, attending exactly as it will at run time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spec_rollout.draft.eagle import EagleHead
from spec_rollout.draft.packing import Pack


def unroll(head: EagleHead, embeds: Tensor, pack: Pack, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields for each of `steps` steps the head's normed hidden states [R, P, H] and where they are valid [R, P].

    Step j feeds entry p with the output of step j - 1 at entry p - 1, as the (j + 1)-th guess does. Its query sees the
    true-feature keys (step 0) up to entry p - j and, of each step k = 1..j, the one key at entry p - j + k (Li et al.,
    EAGLE-3, 2025, figure 6).
    """
    fused = pack.features[..., : head.fc.in_features].to(head.fc.weight.dtype)
    hidden = head.fuse(fused * head.feature_scale)
    size = pack.tokens.shape[1]
    order = torch.arange(size, device=hidden.device)
    document = pack.document
    same = (document[:, :, None] == document[:, None, :]) & (document >= 0)[:, None, :]  # [R, P, P]
    keys, values = [], []
    for j in range(steps):
        q, k, v = head.project(embeds, hidden, pack.positions)
        groups = q.shape[1] // k.shape[1]
        keys.append(k.repeat_interleave(groups, 1))
        values.append(v.repeat_interleave(groups, 1))
        visible = same & (order[None, :] <= order[:, None] - j)
        output = head.combine(_attend(q, keys, values, visible[:, None]), hidden)
        valid = (document >= 0) & (document == _shift(document, j)) & (order >= j)
        yield head.norm(output), valid
        hidden = _shift(output, 1)


def _attend(q: Tensor, keys: list[Tensor], values: list[Tensor], visible: Tensor) -> Tensor:
    """Attention [R, heads, P, D] over the keys of step 0 where `visible` and the later steps' diagonals."""
    scale = q.shape[-1] ** -0.5
    steps = len(keys)
    scores = (q @ keys[0].transpose(-1, -2) * scale).masked_fill(~visible, torch.finfo(q.dtype).min)
    own = [(q * _shift(keys[k], steps - 1 - k, 2)).sum(-1, keepdim=True) * scale for k in range(1, steps)]
    weights = torch.cat([scores, *own], -1).softmax(-1)
    size = keys[0].shape[2]
    attended = weights[..., :size] @ values[0]
    for k in range(1, steps):
        attended = attended + weights[..., size + k - 1, None] * _shift(values[k], steps - 1 - k, 2)
    return attended


def _shift(x: Tensor, by: int, dim: int = 1) -> Tensor:
    """Entry p takes the value of entry p - by; what wraps around belongs to another rollout and is masked."""
    return x.roll(by, dim) if by else x
