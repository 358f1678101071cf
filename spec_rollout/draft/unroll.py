"""Training-time test: the head unrolled on its own output, attending exactly as it will at run time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from spec_rollout.draft.eagle import EagleHead
from spec_rollout.draft.mtp import MtpHead, Unrolled, unrolled_mask
from spec_rollout.draft.packing import Pack


def unroll(
    head: EagleHead | MtpHead, embeds: Tensor, pack: Pack, steps: int, starts: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields for each of `steps` steps the entries [R, N] that it runs at, P where there is none, and the head's
    normed hidden states [R, N, H] there.

    Step 0 runs at all P entries on the target's features. Step j runs at the entries `starts` + j (`starts` [R, S];
    by default all) and feeds entry p with the output of step j - 1 at entry p - 1, as the (j + 1)-th guess does. Its
    query sees the keys of step 0 up to entry p - j and, of each step k = 1..j, the one key at entry p - j + k (Li et
    al., EAGLE-3, 2025, figure 6).
    """
    fused = pack.features[..., : head.fused_width].to(head.fc.weight.dtype)
    hidden = head.fuse(fused * head.feature_scale)
    rows, size = pack.tokens.shape
    document = pack.document
    order = torch.arange(size, device=hidden.device).expand(rows, size)
    starts = order if starts is None else starts
    step = _of_mtp(head) if isinstance(head, MtpHead) else _of_eagle(head)
    for j in range(steps):
        at = starts if j else order
        entries = (at + j).clamp(max=size - 1)
        own = document.gather(1, at)
        visible = (own[:, :, None] == document[:, None, :]) & (order[:, None, :] <= at[:, :, None])  # [R, N, P]
        hidden = step(_pick(embeds, entries), hidden, pack.positions.gather(1, entries), visible)
        valid = (own >= 0) & (document.gather(1, entries) == own) & (at + j < size)
        yield entries.masked_fill(~valid, size), head.norm(hidden)
        hidden = hidden if j else _pick(hidden, starts)


Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(embeddings, hidden states [R, N, H], positions [R, N], entries of step 0 that are visible [R, N, P]) -> the head's
output [R, N, H]; it keeps the keys and values of the steps before."""


def _of_eagle(head: EagleHead) -> Step:
    keys, values = [], []

    def step(embeds: Tensor, hidden: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        q, k, v = head.project(embeds, hidden, positions)
        groups = q.shape[1] // k.shape[1]
        keys.append(k.repeat_interleave(groups, 1))
        values.append(v.repeat_interleave(groups, 1))
        return head.combine(_attend(q, keys, values, visible[:, None]), hidden)

    return step


def _of_mtp(head: MtpHead) -> Step:
    cache = Unrolled()

    def step(embeds: Tensor, hidden: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        return head.read(embeds, hidden, positions, unrolled_mask(visible, len(cache.keys)), cache)

    return step


def _attend(q: Tensor, keys: list[Tensor], values: list[Tensor], visible: Tensor) -> Tensor:
    """Attention [R, heads, N, D] over the keys of step 0 where `visible`, and over those that the later steps of the
    same start have made."""
    scale = q.shape[-1] ** -0.5
    scores = (q @ keys[0].transpose(-1, -2) * scale).masked_fill(~visible, torch.finfo(q.dtype).min)
    own = [(q * k).sum(-1, keepdim=True) * scale for k in keys[1:]]
    weights = torch.cat([scores, *own], -1).softmax(-1)
    size = keys[0].shape[2]
    attended = weights[..., :size] @ values[0]
    for k, v in enumerate(values[1:]):
        attended = attended + weights[..., size + k, None] * v
    return attended


def _pick(x: Tensor, entries: Tensor) -> Tensor:
    """x [R, P, H] at `entries` [R, N]."""
    return x.gather(1, entries[..., None].expand(-1, -1, x.shape[-1]))
