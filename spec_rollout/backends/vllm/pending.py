"""What a draft head has yet to read, of each request of vLLM's batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


class Pending:
    """Of row b the first `counts[b]` entries are of tokens that the head has not read, at most `depth`.

    Args:
        slots: rows.
        depth: entries of a row.
        like: a feature [F], whose size, precision and device the others have.
    """

    def __init__(self, slots: int, depth: int, like: Tensor):
        self.depth = depth
        self.counts = np.zeros(slots, dtype=np.int64)
        self.features = like.new_empty(slots, self.depth, len(like))
        """Of the token, [slots, depth, F]."""
        self.numbers = torch.empty(slots, self.depth, 3, dtype=torch.int64, device=like.device)
        """The token behind it, its position, and where in vLLM's cache its keys and values belong."""
        self._ids: list[str] = []

    @property
    def full(self) -> bool:
        """Whether a row has no room for one more."""
        return bool((self.counts == self.depth).any())

    def follow(self, ids: Sequence[str]) -> None:
        """The batch now consists of the requests `ids`, in this order; what is kept of others is dropped."""
        if ids == self._ids:
            return
        before = {name: row for row, name in enumerate(self._ids)}
        moves = [(before[name], row) for row, name in enumerate(ids) if before.get(name, row) != row]
        counts = np.zeros_like(self.counts)
        stays = [(before[name], row) for row, name in enumerate(ids) if name in before]
        if stays:
            source, target = map(list, zip(*stays, strict=True))
            counts[target] = self.counts[source]
        if moves and counts.any():
            source, target = map(list, zip(*moves, strict=True))
            self.features[target], self.numbers[target] = self.features[source], self.numbers[source]
        self.counts, self._ids = counts, list(ids)

    def keep(self, features: Tensor, following: Tensor, places: Tensor, slots: Tensor) -> None:
        """One more entry for each row: features [B, F], the rest [B]."""
        rows = torch.arange(len(features), device=features.device)
        entry = torch.from_numpy(self.counts[: len(features)]).to(features.device)
        self.features[rows, entry] = features
        self.numbers[rows, entry] = torch.stack([following.long(), places.long(), slots.long()], 1)
        self.counts[: len(features)] += 1

    def portions(self, most: int) -> Iterator[np.ndarray]:
        """Rows with entries, in turns of at most `most` entries together."""
        rows = np.flatnonzero(self.counts)
        turn = np.cumsum(self.counts[rows]) // (most - self.depth)
        for number in np.unique(turn):
            yield rows[turn == number]

    def take(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor, np.ndarray]:
        """Features [N, F] of all entries of `rows`, row after row; the tokens behind them, positions and places in the
        cache, [N] each; where each row ends [R]. They count as read."""
        counts = self.counts[rows]
        row = torch.from_numpy(np.repeat(rows, counts))
        ends = counts.cumsum()
        entry = torch.from_numpy(np.arange(ends[-1]) - np.repeat(ends - counts, counts))
        following, places, slots = self.numbers[row, entry].unbind(1)
        self.counts[rows] = 0
        return self.features[row, entry], following.int(), places.contiguous(), slots.contiguous(), ends
