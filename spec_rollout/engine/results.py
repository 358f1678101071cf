"""The finished part of a rollout: what rows leave behind when they end."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spec_rollout.engine.rows import Rows
from spec_rollout.engine.transfers import Slots, on_both_sides, upload
from spec_rollout.records import Completion, FinishReason


class Results:
    """Collects rows that end, as packed tensors on the device; they come to the host once, at the end.

    What is kept grows with the tokens that were emitted, not with the tokens that might have been.
    """

    def __init__(self, requests: int, eos_token_ids: tuple[int, ...]):
        self.requests, self.eos = requests, set(eos_token_ids)
        self._indices: list[int] = []
        self._sizes: list[int] = []
        self._ended: list[bool] = []
        self._tokens: list[Tensor] = []
        self._logprobs: list[Tensor] = []
        self._counts: list[Tensor] = []

    def take(self, rows: Rows, slots: np.ndarray, indices: list[int], ended: np.ndarray) -> Slots:
        """The rows in `slots` [N] are complete: they answer the requests `indices` [N]; `ended` [N] are those that
        stopped by themselves. Returns `slots`, told to the device."""
        sizes = rows.lengths[slots] + 1 - rows.starts[slots]
        owner = np.repeat(np.arange(len(slots)), sizes)
        within = np.arange(len(owner)) - np.repeat(sizes.cumsum() - sizes, sizes)
        places = np.stack([slots[owner], rows.starts[slots][owner] + within])
        row, place = upload(places, rows.device).unbind(0)
        self._tokens.append(rows.tokens[row, place])
        self._logprobs.append(rows.logprobs[row, place])
        left = on_both_sides(slots, rows.device)
        self._counts.append(torch.stack([c[left.device] for c in (rows.steps, rows.drafted, rows.accepted)], 1))
        self._indices += indices
        self._sizes += sizes.tolist()
        self._ended += ended.astype(bool).tolist()
        return left

    def completions(self) -> list[Completion]:
        """The completions in the order of the requests, once all have left."""
        tokens, logprobs = (torch.cat(parts).tolist() for parts in (self._tokens, self._logprobs))
        counts = torch.cat(self._counts).tolist()
        found: list[Completion] = [None] * self.requests
        stop = 0
        for index, size, ended, (steps, drafted, accepted) in zip(
            self._indices, self._sizes, self._ended, counts, strict=True
        ):
            start, stop = stop, stop + size
            ids = tokens[start:stop]
            reason: FinishReason = "length" if not ended else "eos" if ids[-1] in self.eos else "stop"
            found[index] = Completion(ids, logprobs[start:stop], reason, steps, drafted, accepted)
        return found
