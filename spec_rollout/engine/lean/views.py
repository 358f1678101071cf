"""Views that the lean pass makes once, not in every layer of every step; the cache that they are of keeps them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spec_rollout.engine.kv_cache import SlotCache

LayerBuffers = tuple[Tensor, Tensor, Tensor, Tensor]


def views_of(cache: SlotCache, rows: int, extent: int) -> list[LayerBuffers]:
    """For each layer: keys and values to write into, [slots · Hk · capacity, D], and those to read,
    [rows, Hk, extent, D]."""
    found = cache.views.get((rows, extent))
    if found is None:
        found = cache.views[rows, extent] = [
            (
                keys.flatten(0, 2),
                values.flatten(0, 2),
                keys[:rows, :, :extent],
                values[:rows, :, :extent],
            )
            for keys, values in zip(cache.keys, cache.values, strict=True)
        ]
    return found


def index_of(cache: SlotCache, positions: Tensor) -> Tensor:
    """Where the tokens at `positions` [B, T] of the slots from 0 on lie in the flat buffers: [B · T, Hk]."""
    starts = cache.views.get("starts")
    if starts is None:
        slots, heads, capacity, _ = cache.keys[0].shape
        each = torch.arange(slots * heads, device=positions.device) * capacity
        starts = cache.views["starts"] = each.view(slots, 1, heads)
    return (starts[: len(positions)] + positions[..., None]).flatten(0, 1)


class Streams(Sequence):
    """Hidden states [B, T, H] of a flat pass, each `flat` as [N, H] or with `columns` [H, N], reshaped when they are
    asked for."""

    def __init__(self, flat: list[Tensor], rows: int, width: int, columns: bool = False):
        self.flat, self.shape, self.columns = flat, (rows, width, -1), columns

    def __len__(self) -> int:
        return len(self.flat)

    def __getitem__(self, number):
        found = self.flat[number]
        return (found.t() if self.columns else found).view(self.shape)
