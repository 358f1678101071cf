"""Verification by rejection sampling, the classical alternative to comparing: lossless in law only.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023), and Chen et al., "Accelerating
Large Language Model Decoding with Speculative Sampling" (2023): a guess x, drawn from q, is accepted with probability
min(1, p(x) / q(x)), and otherwise replaced by a sample of (p - q)₊. No scheme accepts more often; but what is drawn
depends on the draft and on how far it guessed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spec_rollout.engine.gumbel_max import draw, noise_width

LEAST = 1e-38
"""Weight of what cannot be drawn."""


class Proposal(NamedTuple):
    """What guesses were drawn from: `scores` [B, γ, N] of the tokens `ids` [N], ascending, whose softmax is q; None is
    the whole vocabulary."""

    scores: Tensor
    ids: Tensor | None


def numbers(vocab_size: int) -> int:
    """Random numbers per position: for the draft's sample, for the target's, and for accepting."""
    return 2 * noise_width(vocab_size) + 1


def draw_by_rejection(
    z: Tensor, noise: Tensor, guesses: Tensor, proposal: Proposal | None, room: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples [B, γ + 1] whose prefix up to the first that differs from `guesses` [B, γ] follows softmax(z), whatever
    the guesses; logsumexp(z) [B, γ + 1]; and the rows [B] in which the proposal cannot be what they were drawn from.

    Args:
        z: processed logits [B, γ + 1, V].
        noise: Gumbel noise [B, γ + 1, noise_width(V) + 1], independent of the guesses.
        proposal: None where the guesses are what they are, as an n-gram's: q is then 1 at the guess, and so it is
            where q is NaN or 0 there.
        room: [B, γ + 1, V] float32 to compute in.
    """
    gamma, at = guesses.shape[1], guesses[..., None]
    normaliser = room.copy_(z).logsumexp(-1)
    p = room.sub_(normaliser[..., None]).exp_()
    wanted = p[:, :gamma].gather(2, at)  # [B, γ, 1]
    distrusted = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    if proposal is None:
        p[:, :gamma].scatter_(2, at, 0.0)
    else:
        q, ids, at_guess = _proposed(proposal, guesses, p.shape[2])
        given = ~(at_guess > 0)  # NaN too
        wanted = torch.where(given, wanted, wanted / at_guess)
        p[:, :gamma].index_add_(2, ids, q.masked_fill_(given, 0.0), alpha=-1)
        p[:, :gamma].scatter_(2, at, p[:, :gamma].gather(2, at).masked_fill_(given, 0.0))
        distrusted = given.any(1)[:, 0]
    uniform = (-(-noise[:, :gamma, -1]).exp()).exp()
    rest = draw(p.clamp_(min=LEAST).log_(), noise[..., :-1])[0]
    accepted = uniform <= wanted[..., 0]  # what is certain is accepted, even where rounding makes `uniform` 1
    samples = torch.cat([torch.where(accepted, guesses, rest[:, :gamma]), rest[:, gamma:]], 1)
    return samples, normaliser, distrusted


def _proposed(proposal: Proposal, guesses: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, γ, N], its tokens [N], and q at the guesses [B, γ, 1], which is NaN where the ids are not what they should
    be: in ascending order, of the vocabulary, and the guess among them."""
    q = proposal.scores.softmax(-1)
    if proposal.ids is None:
        return q, torch.arange(vocab_size, device=q.device), q.gather(2, guesses[..., None])
    ids = proposal.ids.clamp(0, vocab_size - 1)
    place = torch.searchsorted(ids, guesses[..., None]).clamp_(max=len(ids) - 1)
    holds = (ids[place] == guesses[..., None]) & (ids.diff() > 0).all() & (ids == proposal.ids).all()
    return q, ids, q.gather(2, place).masked_fill(~holds, torch.nan)
