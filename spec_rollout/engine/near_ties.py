"""Near-ties: samples that won by less than rounding are decided by a pass of one shape, whatever decoding did."""

from __future__ import annotations

import torch
from torch import Tensor

from spec_rollout.engine.edges import edges, lead
from spec_rollout.engine.gumbel_max import draw
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.sampling import Sampler
from spec_rollout.engine.target import Target
from spec_rollout.records import RolloutStats

NEAR_TIE = {torch.float32: 2e-4, torch.float64: 1e-10}
"""Two passes of different shape round differently; scores closer than this are decided by the canonical pass. Many
times the rounding of a float32 forward pass, and rare: about one token in 10 000."""
USUAL = 16.0
"""Scores larger than this round by more, and the bound grows with them; with a temperature below 1 and with a
repetition penalty, which magnify rounding, it grows in any case."""
RECURRENT = 4
"""Times that for a policy with recurrent layers: a state carries the rounding of all tokens before, and the norm
behind it magnifies what is small; logits of tiny random ones were off by up to 1.7e-4, those of others by 2e-5."""


class NearTies:
    """Finds the samples that another pass might draw differently, and settles them."""

    def __init__(self, target: Target, sampler: Sampler, stats: RolloutStats):
        self.target, self.sampler, self.stats = target, sampler, stats
        penalty = sampler.params.repetition_penalty
        self.magnified = max(penalty, 1 / penalty) / min(sampler.temperature, 1.0)

    @property
    def base(self) -> float:
        """The bound for scores of usual size; 0 where near-ties are too many to be settled."""
        return NEAR_TIE.get(self.target.precision, 0.0) * (RECURRENT if self.target.recurrent else 1)

    def bound(self, z: Tensor) -> Tensor:
        """How close scores [..., V] may come before they are a near-tie, [...]."""
        low, high = z.amin(-1), z.amax(-1)  # findings/torch-aminmax-is-slower.sh
        size = torch.maximum(torch.where(low.isfinite(), low, high).abs(), high.abs())
        return self.base * (size / USUAL).clamp(min=self.magnified)

    def close(self, z: Tensor, kept: Tensor, noise: Tensor | None, samples: Tensor, margin: Tensor) -> Tensor:
        """Which `samples` [B, γ + 1] are near-ties: by the `margin` with which they were drawn from `kept`
        [B, γ + 1, V], or since `kept` might as well be other tokens of the scores `z`."""
        if not self.base:
            return torch.zeros_like(margin, dtype=torch.bool)
        bound = self.bound(z)
        if kept is not z:
            margin = margin.minimum(lead(z, noise, samples, edges(z, self.sampler.params, bound), bound))
        return margin < bound

    def settle(
        self,
        rows: Rows,
        inputs: Tensor,
        samples: Tensor,
        scores: Tensor,
        noise: Tensor | None,
        seen: Tensor | None,
        close: Tensor,
    ) -> None:
        """Decide `samples` [B, γ + 1] and their log-probs `scores` where `close` by the canonical pass, in place, so
        that they are the same whatever the shape of the pass that read `inputs` [B, γ + 1]. Rare, hence a loop."""
        for row, place in close.nonzero().tolist():
            known = rows.tokens[row, : rows.length[row] + 1]
            ids = torch.cat([known, inputs[row, 1 : place + 1]])
            z = self.sampler.process(self.target.canonical(ids), None if seen is None else seen[row, place])
            sample, _, normaliser = draw(z, None if noise is None else noise[row, place])
            if noise is None:
                sample = z.argmax()  # the lowest id of any number of equals
            samples[row, place], scores[row, place] = sample, z[sample].float() - normaliser
            self.stats.near_ties += 1
