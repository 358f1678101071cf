"""What the head is trained towards: the target's own distribution over the draft vocabulary, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spec_rollout.draft.eagle import EagleHead
from spec_rollout.draft.packing import Pack
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.unroll import unroll

STEP_DECAY = 0.8
"""Weight of each further unrolled step in the loss (EAGLE-3)."""


class Scored(NamedTuple):
    """One unrolled step at N entries: log-probabilities of the head, probabilities of the target, [N, Vd] float32."""

    log_q: Tensor
    target: Tensor


def scores(
    head: EagleHead, view: PolicyView, batch: Pack, steps: int, starts: Tensor | None = None
) -> Iterator[Scored]:
    """What `head` and the policy of `view` say of `batch`, in each of `steps` unrolled steps.

    Args:
        starts: entries [R, S] from which the steps after the first are unrolled; None for all.
    """
    rows = view.output_rows()
    with torch.no_grad():
        final = batch.features[..., head.fused_width :].roll(-1, 1)  # the state that predicts token p + 2
        target = view.logits(final[batch.learn], rows).softmax(-1)
        embeds = view.embed(batch.tokens).to(head.fc.weight.dtype)
        place = torch.full((len(batch.learn), batch.learn.shape[1] + 1), -1, device=rows.device)
        place[:, :-1][batch.learn] = torch.arange(len(target), device=rows.device)
    rows = rows.to(embeds.dtype) if head.own_output is None else head.own_output
    for entries, hidden in unroll(head, embeds, batch, steps, starts):
        at = place.gather(1, entries)
        yield Scored(F.linear(hidden[at >= 0], rows).float().log_softmax(-1), target[at[at >= 0]])


def divergence(steps: Iterable[Scored]) -> Tensor:
    """Mean Kullback-Leibler divergence (the gradient of soft cross-entropy) of each unrolled step; a further step
    weighs `STEP_DECAY` of the one before. A scalar."""
    total = weights = 0.0
    for j, (log_q, target) in enumerate(steps):
        divergences = F.kl_div(log_q, target, reduction="none").sum(-1)
        total = total + STEP_DECAY**j * divergences.sum() / max(1, len(divergences))
        weights += STEP_DECAY**j
    return total / weights


def overlap(step: Scored, temperature: float) -> Tensor:
    """Sum over the entries of Σ min(p, q) at `temperature`, which the acceptance by keyed sampling comes close to. A
    scalar."""
    q, p = (step.log_q / temperature).softmax(-1), (step.target.log() / temperature).softmax(-1)
    return torch.minimum(q, p).sum()
