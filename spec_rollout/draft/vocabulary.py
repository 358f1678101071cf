"""The draft vocabulary: the tokens that this task's rollouts use."""

from __future__ import annotations

import torch
from torch import Tensor

from spec_rollout.draft.features import Sample

DRAFT_VOCABULARY = 8192
"""Most tokens that the draft may guess. Every guess costs a product with that many output rows."""
COVERAGE = 0.995
"""Share of sampled tokens that the draft vocabulary must cover before it is ranked anew."""


def choose_vocabulary(samples: list[Sample], vocab_size: int, present: Tensor | None) -> Tensor | None:
    """Target ids [Vd], ascending, that the draft may guess; None for the whole vocabulary.

    The most frequent completion tokens, then prompt tokens, then the lowest ids. `present` stays while it covers
    `COVERAGE` of the completions.
    """
    if vocab_size <= DRAFT_VOCABULARY or not samples:
        return present
    device = samples[0].tokens.device
    completions = torch.cat([s.tokens[s.prompt :] for s in samples])
    if present is not None and torch.isin(completions, present).float().mean() >= COVERAGE:
        return present
    prompts = torch.cat([s.tokens[: s.prompt] for s in samples])
    rank = torch.bincount(completions, minlength=vocab_size).double()
    rank += 0.5 * (torch.bincount(prompts, minlength=vocab_size) > 0)
    rank -= torch.arange(vocab_size, device=device) / (4.0 * vocab_size)
    return rank.topk(DRAFT_VOCABULARY).indices.sort().values
