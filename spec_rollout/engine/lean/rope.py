"""Rotary position embedding from tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spec_rollout.engine.lean.recognition import takes_layer_type

Angles = tuple[Tensor, Tensor, Tensor]
"""cos [N, 1, D], and what the second half of a head is multiplied with to go into the first, -sin [N, 1, D / 2], and
the first to go into the second, sin [N, 1, D / 2]."""


class RopeTables:
    """The angles of every position, for each kind of layer, as the policy's own module computes them."""

    def __init__(self, rotary: nn.Module, kinds: set[str], like: Tensor, context: int | None):
        self.rotary, self.kinds, self.like, self.context = rotary, kinds, like, context
        self.size = 0
        self._tables: dict[str, Tensor] = {}

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
            self._tables[kind] = table(cos[0], sin[0])

    def at(self, positions: Tensor) -> dict[str, Angles]:
        """Those at `positions` [N], for each kind of layer."""
        return {kind: angles(row) for kind, row in self.rows(positions).items()}

    def rows(self, positions: Tensor) -> dict[str, Tensor]:
        """The rows [N, 2 D] of the tables at `positions` [N], for each kind of layer."""
        place = positions if self.context is None else positions.clamp(max=self.size - 1)
        return {kind: found[place] for kind, found in self._tables.items()}


def table(cos: Tensor, sin: Tensor) -> Tensor:
    """[P, 2 D] of cosines and sines [P, D] in the half-split layout of Llama: cos, -sin, sin."""
    half = sin.shape[-1] // 2
    return torch.cat([cos, -sin[:, :half], sin[:, half:]], -1)


def angles(row: Tensor) -> Angles:
    """The angles in rows [N, 2 D] of a `table`."""
    size = row.shape[-1] // 2
    return row[:, None].split([size, size // 2, size // 2], -1)
