"""From a pass's logits to the target's own samples and their log-probs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spec_rollout.engine.guarded_drafter import GuardedDrafter
from spec_rollout.engine.gumbel_max import draw, noise_width
from spec_rollout.engine.near_ties import NearTies
from spec_rollout.engine.planned import Selection
from spec_rollout.engine.rejection import draw_by_rejection
from spec_rollout.engine.sampling import Sampler


class Drawn(NamedTuple):
    """`samples`, whether they are `close`, that is near-ties, the `normaliser` of what they were drawn from, and their
    log-probs `scores`, each [B, γ + 1]; and rows `distrusted` [B], whose guesses were not drawn from the proposal."""

    samples: Tensor
    close: Tensor
    normaliser: Tensor
    scores: Tensor
    distrusted: Tensor


class Drawing:
    """Draws by comparison, or by rejection sampling."""

    def __init__(self, sampler: Sampler, near_ties: NearTies, draft: GuardedDrafter, rejection: bool):
        self.sampler, self.near_ties, self.draft, self.rejection = sampler, near_ties, draft, rejection

    def draw(
        self,
        logits: Tensor,
        seen: Tensor | None,
        noise: Tensor | None,
        guesses: Tensor,
        invalid: Tensor,
        selection: Selection | None,
    ) -> Drawn:
        """Samples after the `guesses` [B, γ].

        Args:
            logits: [B, γ + 1, V], or [1, N, V] of the tokens that the pass read by its `selection`.
            seen: tokens seen before each sample [B, γ + 1, V], where that counts.
            noise: [B, γ + 1, numbers], None when greedy.
            invalid: [B] rows whose guesses were no token ids.
        """
        if selection is not None:
            seen, noise = selection.take(seen), selection.take(noise)
        z = self.sampler.scale(logits, seen)
        kept = self.sampler.filter(z)
        room = self.sampler.room(kept)
        distrusted = invalid
        if self.rejection:
            samples, normaliser, distrusted = self._by_rejection(kept, noise, guesses, invalid, room)
            close = torch.zeros_like(samples, dtype=torch.bool)  # another γ draws another one anyway
        else:
            samples, margin, normaliser = draw(kept, noise, room)
            close = self.near_ties.close(z, kept, noise, samples, margin)
        scores = kept.gather(-1, samples[..., None])[..., 0].float() - normaliser
        if selection is not None:
            samples, close, normaliser, scores = map(selection.spread, (samples, close, normaliser, scores))
        return Drawn(samples, close, normaliser, scores, distrusted)

    def _by_rejection(
        self, kept: Tensor, noise: Tensor, guesses: Tensor, invalid: Tensor, room: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Without a proposal the guesses are taken as given: the same law."""
        vocab_size = kept.shape[-1]
        proposal = self.draft.proposal(guesses, invalid, vocab_size) if guesses.numel() else None
        noise = noise[..., noise_width(vocab_size) :]
        samples, normaliser, distrusted = draw_by_rejection(kept, noise, guesses, proposal, room)
        return samples, normaliser, invalid | distrusted
