"""The draft head at run time: catches up with the committed tokens, then guesses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spec_rollout.draft.arbiter import Arbiter
from spec_rollout.draft.collector import Collector
from spec_rollout.draft.eagle import EagleHead
from spec_rollout.draft.entries import HeadEntries
from spec_rollout.draft.features import FeatureBuffer
from spec_rollout.draft.head_passes import LEAN_WIDTH, HeadPasses
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.engine.kv_cache import rounded_up
from spec_rollout.engine.rejection import Proposal
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.transfers import Slots, upload

CATCH_UP_TOKENS = 8192
"""Most tokens, over all rows, of one catch-up pass."""


class EagleDrafter(HeadEntries, HeadPasses):
    """Guesses with an `EagleHead`.

    Entry p of a slot pairs token p + 1 with the target's feature at p. `known` entries of a slot have been through the
    head with true features; the rest, left by plain decoding or rejected guesses, is caught up in one pass, before the
    `collector`'s window has no room for more. Pieces of prompts are read as they come.

    Args:
        head: the draft head, in the policy's dtype.
        view: the policy's embedding and output head.
        buffer: takes features to learn from; None collects nothing.
        compiled: as `compile_passes`; by halves of the layer, kept in `folder`, or whole functions.
    """

    def __init__(
        self,
        head: EagleHead,
        view: PolicyView,
        buffer: FeatureBuffer | None = None,
        compiled: str = "false",
        folder: str | None = None,
    ):
        layers = head.config.aux_layers
        self.collector = Collector(layers, head.fc.weight.new_empty(head.fused_width // len(layers)), buffer)
        super().__init__(head, view, self.collector.window, compiled, folder)
        self.ready = False
        """False until the head has been trained or loaded: it then only collects."""
        self.arbiter: Arbiter | None = None
        """Between this head and the table of earlier rollouts; None, and the head guesses alone."""
        self._scores: list[Tensor] = []
        """Of the last guesses, [B, Vd] each."""

    @property
    def shape(self) -> dict:
        """What the time of a guess depends on."""
        own, ids = self.head.own_output, self.view.draft_ids
        rows = len(own) if own is not None else self.head.config.vocab_size if ids is None else len(ids)
        return self.head.config.to_dict() | {"output_rows": rows}

    def slot_bytes(self, capacity: int) -> int:
        own = self.cached_numbers * self.head.fc.weight.itemsize * self.ready
        return capacity * own + self.collector.slot_bytes(capacity, self.ready)

    @property
    def cached_numbers(self) -> int:
        """Numbers that the head keeps for a token."""
        return 2 * self.head.config.num_key_value_heads * self.head.config.head_dim

    def begin(self, rows: Rows) -> None:
        self.collector.begin(rows, reads=self.ready)
        self._begin(rows)
        if not self.ready:
            return
        self.take_weights()
        self.cache.allocate(rows.slots, rows.capacity, self.head.fc.weight.dtype)
        if self.arbiter is not None:
            self.arbiter.begin()

    def end(self) -> None:
        self.collector.end()
        self.release()
        self._scores = []

    def resize(self, rows: Rows, kept: int) -> None:
        self.collector.resize(rows, kept)
        self.cache.resize(len(rows.tokens), rows.capacity, kept)

    def read(self, rows: Rows, slots: tuple[int, int], start: np.ndarray, hidden: Sequence[Tensor]) -> None:
        self.collector.read(rows, slots, start, hidden)
        if not self.ready:
            return
        here, end = slice(*slots), np.minimum(start + hidden[-1].shape[1], rows.lengths[slice(*slots)])
        place = upload(start, rows.device)[:, None] + torch.arange(int((end - start).max()), device=rows.device)
        self.known[here] = end
        if place.shape[1]:
            true = torch.cat([hidden[i][:, : place.shape[1]] for i in self.head.config.aux_layers], -1)
            fused = self.head.fuse(true.to(self.head.fc.weight.dtype))
            place = place.clamp(max=rows.capacity - 2)  # beyond a row's length is padding
            tokens, extent = rows.tokens[here].gather(1, place + 1), min(rounded_up(int(end.max())), rows.capacity)
            self._put(tokens, fused, place, extent, slots[0])

    def admit(self, rows: Rows, slots: tuple[int, int]) -> None:
        self.collector.admit(rows, slots)
        here = slice(*slots)
        np.minimum(self.known[here], rows.lengths[here], out=self.known[here])

    def observe(self, rows: Rows, slots: tuple[int, int], start: Tensor, hidden: Sequence[Tensor]) -> None:
        if self.ready:
            here, width = slice(*slots), hidden[-1].shape[1]
            self.window.fit(rows, width)
            if self.window.missing(rows, here, self.known[here], width).any():
                self._read_until(rows, *slots, self.window.seen[here], 0)
        self.collector.observe(rows, slots, start, hidden)
        if self.arbiter is not None:
            self.arbiter.observe(rows, start)

    def propose(self, rows: Rows, gamma: int, noise: Tensor | None, temperature: float) -> Tensor:
        """None where the head is not ready."""
        count = rows.count
        if not self.ready:
            return rows.tokens[:count, :0]
        most = min(LEAN_WIDTH, max(1, CATCH_UP_TOKENS // count))  # entries that are behind are cheaper only read
        width = self._read_until(rows, 0, count, rows.lengths[:count], most)
        known = upload(self.known[:count], rows.device)
        lanes = [None] * gamma if noise is None else noise[:, :gamma].unbind(1)
        state = (rows.tokens, self.window.kept, rows.start, rows.length)
        guesses = [self.first(known, *state, lanes[0], temperature, width, self._extent(rows, 0), *self._cache())]
        self.known[:count] = rows.lengths[:count]
        if self.arbiter is not None:
            self.arbiter.start(rows)
            guesses[0] = self.arbiter.choose(guesses[0], lanes[0])
        places = rows.positions(gamma).split(1, 1)
        for i in range(1, gamma):
            last, extent = guesses[-1], self._extent(rows, i)
            guess = self.next(last.tokens, last.hidden, places[i - 1], lanes[i], temperature, extent, *self._cache())
            guesses.append(guess if self.arbiter is None else self.arbiter.choose(guess, lanes[i]))
        self._scores = [guess.scores for guess in guesses]
        return torch.cat([guess.tokens for guess in guesses], 1)

    def proposal(self) -> Proposal | None:
        """None where some guesses may be the table's."""
        if self.arbiter is not None:
            return None
        return Proposal(torch.stack(self._scores, 1), self.view.draft_ids)

    def _read_until(self, rows: Rows, start: int, stop: int, lengths: np.ndarray, most: int) -> int:
        """Read entries of slots start..stop-1 until none has more than `most` left before its own of `lengths`; the
        last one is left in any case, unless `most` is 0. Returns how many the slot with the most has left."""
        known = self.known[start:stop]
        end = np.maximum(lengths - min(most, 1), 0)
        np.clip(known, 0, end, out=known)
        width = max(1, CATCH_UP_TOKENS // (stop - start))
        while (behind := int((lengths - known).max())) > most:
            first = upload(known, rows.device)
            here = (rows.tokens[start:stop], self.window.kept[start:stop], rows.start[start:stop])
            tokens, fused, place = self._entries(first, *here, min(width, behind))
            self._put(tokens, fused, place, self._extent(rows, 0), start)
            np.minimum(known + width, end, out=known)
        return max(1, behind)

    def _extent(self, rows: Rows, ahead: int) -> int:
        longest = int(rows.lengths[: rows.count].max()) + ahead
        return min(rounded_up(max(longest, 1)), rows.capacity)

    def copy(self, rows: Rows, source: Slots, target: Slots) -> None:
        self.collector.copy(rows, source, target)
        self._copy(rows, source, target, int(rows.lengths[target.host].max()))

    def finish(self, rows: Rows, slots: Slots) -> None:
        self.collector.finish(rows, slots)
