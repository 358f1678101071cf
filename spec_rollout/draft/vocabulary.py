"""The draft vocabulary: the tokens that this task's rollouts use."""

from __future__ import annotations

import torch
from torch import Tensor

from spec_rollout.draft import ranks
from spec_rollout.draft.features import Sample
from spec_rollout.draft.policy_view import PolicyView

DRAFT_VOCABULARY = 8192
"""Most tokens that the draft may guess. Every guess costs a product with that many output rows."""
COVERAGE = 0.995
"""Share of sampled tokens that the draft vocabulary must cover before it is ranked anew."""


def choose_vocabulary(samples: list[Sample], view: PolicyView) -> Tensor | None:
    """Target ids [Vd], ascending, that the draft may guess; None for the whole vocabulary. The same on every rank.

    The most frequent completion tokens, then prompt tokens, then the lowest ids. What `view` has now stays while it
    covers `COVERAGE` of the completions.
    """
    present, size = view.draft_ids, view.config.vocab_size
    if size <= DRAFT_VOCABULARY:
        return present
    counts = torch.zeros(2, size, dtype=torch.float64, device=view.embedding.device)  # in completions, in prompts
    if samples:
        cut = [s.tokens.tensor_split((max(0, s.prompt - s.first),)) for s in samples]
        counts[0] = torch.bincount(torch.cat([completion for _, completion in cut]), minlength=size)
        counts[1] = torch.bincount(torch.cat([prompt for prompt, _ in cut]), minlength=size)
    ranks.total(counts)
    if not counts.any() or (present is not None and counts[0, present].sum() >= COVERAGE * counts[0].sum()):
        return present
    order = counts[0] + 0.5 * (counts[1] > 0) - torch.arange(size, device=counts.device) / (4.0 * size)
    return order.topk(DRAFT_VOCABULARY).indices.sort().values
