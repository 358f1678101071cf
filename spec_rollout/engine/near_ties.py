"""Near-ties: samples that won by less than rounding are decided by a pass of one shape, whatever decoding did."""

from __future__ import annotations

import torch
from torch import Tensor

from spec_rollout.engine.gumbel_max import draw
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.sampling import Sampler
from spec_rollout.engine.target import Target
from spec_rollout.records import RolloutStats

NEAR_TIE = {torch.float32: 2e-4, torch.float64: 1e-10}
"""Two passes of different shape round differently; scores closer than this are decided by the canonical pass. Many
times the rounding of a float32 forward pass, and rare: about one token in 10 000. At a temperature below 1, which
magnifies the rounding, the bound grows with it."""
RECURRENT = 4
"""Times that for a policy with recurrent layers: a state carries the rounding of all tokens before, and the norm
behind it magnifies what is small; logits of tiny random ones were off by up to 1.7e-4, those of others by 2e-5."""


class NearTies:
    """Finds the samples that another pass might draw differently, and settles them."""

    def __init__(self, target: Target, sampler: Sampler, stats: RolloutStats):
        self.target, self.sampler, self.stats = target, sampler, stats
        rounding = NEAR_TIE.get(target.precision, 0.0) * (RECURRENT if target.recurrent else 1)
        self.bound = rounding / min(sampler.temperature, 1.0)

    def concerned(self, margin: Tensor, emitted: Tensor) -> Tensor:
        """The rows [B] with a near-tie among the samples that they emit; `margin` [B, γ + 1], `emitted` [B]."""
        close = margin < self.bound
        close &= torch.arange(close.shape[1], device=close.device) < emitted[:, None]
        return close.any(1)

    def settle(
        self,
        rows: Rows,
        inputs: Tensor,
        samples: Tensor,
        margin: Tensor,
        noise: Tensor | None,
        seen: Tensor | None,
        concerned: Tensor,
    ) -> Tensor:
        """The samples [B, γ + 1], the near-ties of the rows `concerned` [B] decided by the canonical pass, so that a
        sample is the same whatever the shape of the pass that read `inputs` [B, γ + 1]. Rare, hence a loop."""
        samples = samples.clone()
        close = (margin < self.bound) & concerned[:, None]
        for row, place in close.nonzero().tolist():
            known = rows.tokens[row, : rows.length[row] + 1]
            ids = torch.cat([known, inputs[row, 1 : place + 1]])
            z = self.sampler.process(self.target.canonical(ids), None if seen is None else seen[row, place])
            samples[row, place] = draw(z, None if noise is None else noise[row, place])[0]
            self.stats.near_ties += 1
        return samples
