"""What the rollout in progress has drawn so far, to guess from: siblings of a group, and the row itself."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spec_rollout.draft.ngrams import NgramTable
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.transfers import upload

GROWTH = 1.25
"""The table is made anew when there are so many times the tokens that are in it: all in all that takes five times what
the last one takes."""
LEAST = 64
"""Tokens of the first table; prompts count."""


class RunningTable:
    """A table of the active and the finished rows of one rollout.

    Attributes:
        table: None until there are LEAST tokens.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.table: NgramTable | None = None
        self._size = 0
        self._finished: list[tuple[Tensor, Tensor]] = []
        self._finished_size = 0

    def follow(self, rows: Rows) -> None:
        """Take in what the active rows have drawn, if it has grown enough. On a GPU that waits for it, some twenty
        times in a rollout."""
        size = self._finished_size + int((rows.lengths[: rows.count] + 1).sum())
        if size < max(LEAST, GROWTH * self._size):
            return
        parts = [*self._finished, _taken(rows, np.arange(rows.count))]
        tokens, place = (torch.cat(columns) for columns in zip(*parts, strict=True))
        self.table, self._size = NgramTable.of(tokens, place), size

    def finish(self, rows: Rows, slots: np.ndarray) -> None:
        """Keep the rows in `slots` [N], which are about to leave."""
        tokens, place = _taken(rows, slots)
        self._finished.append((tokens, place))
        self._finished_size += len(tokens)


def _taken(rows: Rows, slots: np.ndarray) -> tuple[Tensor, Tensor]:
    """The known tokens of the rows in `slots`, one behind the other, and the place of each in its row; [n] both."""
    sizes = rows.lengths[slots] + 1
    within = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
    place = upload(np.stack([np.repeat(slots, sizes), within]), rows.device)
    return rows.tokens[place[0], place[1]], place[1]
