"""What a draft head has yet to read, of each request of vLLM's batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


class Pending:
    """Of row b the first `counts[b]` entries are of tokens that the head has not read, at most `depth`; and those of
    the latest steps, one for each row, until the batch changes.

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
        self._steps: list[tuple[Sequence[Tensor], Tensor, Tensor, Tensor]] = []
        self._most = 0
        """Entries of the fullest row."""

    @property
    def full(self) -> bool:
        """Whether a row has no room for one more."""
        return self._most + len(self._steps) >= self.depth

    @property
    def empty(self) -> bool:
        return not (self._most or self._steps)

    def follow(self, ids: Sequence[str]) -> None:
        """The batch now consists of the requests `ids`, in this order; what is kept of others is dropped."""
        if ids == self._ids:
            return
        self._sort_in()
        before = {name: row for row, name in enumerate(self._ids)}
        source = [before[name] for name in ids if name in before]
        target = [row for row, name in enumerate(ids) if name in before]
        counts = np.zeros_like(self.counts)
        counts[target] = self.counts[source]
        moved = [(a, b) for a, b in zip(source, target, strict=True) if a != b and counts[b]]
        if moved:
            old, new = map(list, zip(*moved, strict=True))
            self.features[new], self.numbers[new] = self.features[old], self.numbers[old]
        self.counts, self._ids, self._most = counts, list(ids), int(counts.max())

    def keep(self, features: Sequence[Tensor], following: Tensor, places: Tensor, slots: Tensor) -> None:
        """One more entry for each row: features [B, ...] in pieces, the rest [B]. All stay as they are."""
        self._steps.append((features, following, places, slots))

    def portions(self, most: int) -> Iterator[np.ndarray]:
        """Rows with entries, in turns of at most `most` entries together."""
        self._sort_in()
        rows = np.flatnonzero(self.counts)
        turn = np.cumsum(self.counts[rows]) // (most - self.depth)
        for number in np.unique(turn):
            yield rows[turn == number]
        self._most = 0

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

    def _sort_in(self) -> None:
        """Put the latest steps behind what the rows have."""
        if not self._steps:
            return
        features, *others = zip(*self._steps, strict=True)
        numbers = torch.stack([torch.stack(part).long() for part in others], 2)  # [T, B, 3]
        steps, rows = numbers.shape[:2]
        row = torch.arange(rows)
        entry = torch.from_numpy(self.counts[:rows]) + torch.arange(steps)[:, None]
        self.features[row, entry] = torch.cat([torch.stack(part) for part in zip(*features, strict=True)], 2)
        self.numbers[row, entry] = numbers
        self.counts[:rows] += steps
        self._most, self._steps = int(self.counts.max()), []
