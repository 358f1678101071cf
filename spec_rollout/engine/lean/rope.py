"""Rotary position embedding from tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spec_rollout.engine.lean.recognition import takes_layer_type


class RopeTables:
    """cos and sin [P, D] of every position, for each kind of layer, as the policy's own module computes them.

    The sines of the first half of a head are negative, so that x · cos + roll(x, D / 2) · sin is the rotation of the
    pairs (i, i + D / 2).
    """

    def __init__(self, rotary: nn.Module, kinds: set[str], like: Tensor, context: int | None):
        self.rotary, self.kinds, self.like, self.context = rotary, kinds, like, context
        self.size = 0
        self.cos: dict[str, Tensor] = {}
        self.sin: dict[str, Tensor] = {}

    def reach(self, positions: int) -> None:
        """Make the tables at least `positions` long, up to the policy's context."""
        wanted = positions if self.context is None else min(positions, self.context)
        if wanted <= self.size:
            return
        self.size = wanted
        place = torch.arange(wanted, device=self.like.device)[None]
        by_kind = takes_layer_type(self.rotary)
        for kind in self.kinds:
            cos, sin = self.rotary(self.like, place, kind) if by_kind else self.rotary(self.like, place)
            half = sin.shape[-1] // 2
            self.cos[kind] = cos[0].contiguous()
            self.sin[kind] = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)

    def at(self, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """(cos, sin), each [N, 1, D], at `positions` [N], for each kind of layer."""
        place = positions if self.context is None else positions.clamp(max=self.size - 1)
        return {kind: (self.cos[kind][place][:, None], self.sin[kind][place][:, None]) for kind in self.kinds}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [N, heads, D] rotated by `cos` and `sin` [N, 1, D] of `RopeTables`, in its own dtype."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)
