"""Views that the lean pass makes once, not in every layer of every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spec_rollout.engine.kv_cache import SlotCache

LayerBuffers = tuple[Tensor, Tensor, Tensor, Tensor]


class Views:
    """A slot cache as attention writes and reads it."""

    def __init__(self):
        self._first: Tensor | None = None
        self._seen: dict[tuple[int, int], list[LayerBuffers]] = {}
        self._starts: Tensor | None = None

    def _follow(self, cache: SlotCache) -> None:
        """What was made for other buffers is void."""
        keys = cache.keys[0]
        if keys is not self._first:
            self._first = keys
            self._seen.clear()
            slots, heads, capacity, _ = keys.shape
            self._starts = (torch.arange(slots * heads, device=keys.device) * capacity).view(slots, 1, heads)

    def of(self, cache: SlotCache, rows: int, extent: int) -> list[LayerBuffers]:
        """For each layer: keys and values to write into, [slots · Hk · capacity, D], and those to read,
        [rows, Hk, extent, D]."""
        self._follow(cache)
        found = self._seen.get((rows, extent))
        if found is None:
            found = self._seen[rows, extent] = [
                (
                    keys.flatten(0, 2),
                    values.flatten(0, 2),
                    keys[:rows, :, :extent],
                    values[:rows, :, :extent],
                )
                for keys, values in zip(cache.keys, cache.values, strict=True)
            ]
        return found

    def index(self, cache: SlotCache, positions: Tensor) -> Tensor:
        """Where the tokens at `positions` [B, T] of the slots from 0 on lie in the flat buffers: [B · T, Hk]."""
        self._follow(cache)
        return (self._starts[: len(positions)] + positions[..., None]).flatten(0, 1)


class Streams(Sequence):
    """Hidden states [B, T, H] of a flat pass, reshaped when they are asked for."""

    def __init__(self, flat: list[Tensor], rows: int, width: int):
        self.flat, self.shape = flat, (rows, width, -1)

    def __len__(self) -> int:
        return len(self.flat)

    def __getitem__(self, number):
        return self.flat[number].view(self.shape)
