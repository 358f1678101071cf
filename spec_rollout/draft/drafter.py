"""The draft head at run time: catches up with the committed tokens, then guesses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spec_rollout.draft.eagle import EagleHead
from spec_rollout.draft.entries import HeadEntries
from spec_rollout.draft.features import FeatureBuffer
from spec_rollout.draft.lean_head import GraphedHead, LeanHead, lean_head, programs_of
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.engine.compiled import Compiled
from spec_rollout.engine.gumbel_max import draw_among
from spec_rollout.engine.kv_cache import SlotCache, SlotWindow, resized, rounded_up
from spec_rollout.engine.masks import causal_mask
from spec_rollout.engine.rejection import Proposal
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.transfers import Slots, upload

CATCH_UP_TOKENS = 8192
"""Most tokens, over all rows, of one catch-up pass."""

LEAN_WIDTH = 16
"""Most tokens of a row in a lean pass of the head: what a step leaves behind. The mask of a wider one, as over
prompts, would outgrow the keys and values that it saves from being copied."""


class Guess(NamedTuple):
    """One guess per row: tokens [N, 1] of the target's vocabulary, their scores [N, Vd] float32 among the others, and
    the head's hidden state [N, 1, H] that they came from."""

    tokens: Tensor
    scores: Tensor
    hidden: Tensor


class EagleDrafter(HeadEntries):
    """Guesses with an `EagleHead`.

    Entry p of a slot pairs token p + 1 with the target's feature at p. `known` entries of a slot have been through the
    head with true features; the rest, left by plain decoding or rejected guesses, is caught up in one pass.

    Args:
        head: the draft head, in the policy's dtype.
        view: the policy's embedding and output head.
        buffer: takes the features of finished rows; None collects nothing.
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
        self.head, self.view, self.buffer = head, view, buffer
        self.ready = False
        """False until the head has been trained or loaded: it then only collects."""
        self.cache = SlotCache()
        self.features: Tensor | None = None
        self._scores: list[Tensor] = []
        """Of the last guesses, [B, Vd] each."""
        self.fused_width = head.fused_width
        self.compiled, self.folder = compiled, folder
        self.lean: LeanHead | GraphedHead | None = None
        self.first, self.next = self._first, self._next
        if compiled == "true" and not programs_of(head, view, folder, wait=False):
            self.first, self.next = (Compiled(f, "the draft head") for f in (self._first, self._next))

    @property
    def shape(self) -> dict:
        """What the time of a guess depends on."""
        own, ids = self.head.own_output, self.view.draft_ids
        rows = len(own) if own is not None else self.head.config.vocab_size if ids is None else len(ids)
        return self.head.config.to_dict() | {"output_rows": rows}

    @property
    def token_bytes(self) -> int:
        config = self.head.config
        own = 2 * config.num_key_value_heads * config.head_dim + self.fused_width + config.hidden_size
        return own * self.head.fc.weight.itemsize

    def begin(self, rows: Rows) -> None:
        width = self.fused_width + self.head.config.hidden_size
        dtype = self.head.fc.weight.dtype
        self.features = torch.zeros(rows.slots, rows.capacity, width, dtype=dtype, device=rows.device)
        self.cache.allocate(rows.slots, rows.capacity, dtype)
        self._begin(rows)
        own = self.head.own_output
        self.output_rows = (self.view.output_rows() if own is None else own.detach()).to(dtype)
        whole = isinstance(self.first, Compiled)
        self.lean = None if whole else lean_head(self.head, self.view, self.compiled, self.folder)

    def resize(self, rows: Rows, kept: int) -> None:
        slots = len(rows.tokens)
        self.features = resized(self.features, slots, rows.capacity, kept)
        self.cache.resize(slots, rows.capacity, kept)

    def observe(self, rows: Rows, slots: tuple[int, int], start: Tensor, hidden: Sequence[Tensor]) -> None:
        kept = torch.cat([*(hidden[i] for i in self.head.config.aux_layers), hidden[-1]], -1)  # [N, T, F]
        first = torch.arange(*slots, device=rows.device) * rows.capacity + start
        index = first[:, None] + torch.arange(kept.shape[1], device=rows.device)
        flat = self.features.view(-1, self.features.shape[-1])
        flat.index_copy_(0, index.flatten(), kept.flatten(0, 1).to(flat.dtype))

    def admit(self, rows: Rows, slots: tuple[int, int]) -> None:
        if self.ready:
            self._read_until(rows, *slots, 0)

    def propose(self, rows: Rows, gamma: int, noise: Tensor | None, temperature: float) -> Tensor:
        count = rows.count
        width = self._read_until(rows, 0, count, max(1, CATCH_UP_TOKENS // count))
        known = upload(self.known[:count], rows.device)
        lanes = [None] * gamma if noise is None else noise[:, :gamma].unbind(1)
        state = (rows.tokens, self.features, rows.length)
        guesses = [self.first(known, *state, lanes[0], temperature, width, self._extent(rows, 0), *self._cache())]
        self.known[:count] = rows.lengths[:count]
        for i in range(1, gamma):
            place = rows.length[:count, None] + (i - 1)
            last = guesses[-1]
            extent = self._extent(rows, i)
            guesses.append(self.next(last.tokens, last.hidden, place, lanes[i], temperature, extent, *self._cache()))
        self._scores = [guess.scores for guess in guesses]
        return torch.cat([guess.tokens for guess in guesses], 1)

    def proposal(self) -> Proposal:
        return Proposal(torch.stack(self._scores, 1), self.view.draft_ids)

    def _cache(self) -> tuple[list[Tensor], list[Tensor]]:
        """The head's keys and values, made at their first use."""
        cache, config = self.cache, self.head.config
        if not cache.keys:
            size = (cache.slots, config.num_key_value_heads, cache.capacity, config.head_dim)
            cache.keys, cache.values = [self.features.new_zeros(size)], [self.features.new_zeros(size)]
        return cache.keys, cache.values

    def _read_until(self, rows: Rows, start: int, stop: int, most: int) -> int:
        """Read entries of slots start..stop-1 until none has more than `most` left before its committed length; the
        last one is left in any case, unless `most` is 0. Returns how many the slot with the most has left."""
        lengths, known = rows.lengths[start:stop], self.known[start:stop]
        end = np.maximum(lengths - min(most, 1), 0)
        np.clip(known, 0, end, out=known)
        width = max(1, CATCH_UP_TOKENS // (stop - start))
        while (behind := int((lengths - known).max())) > most:
            first = upload(known, rows.device)
            here = (rows.tokens[start:stop], self.features[start:stop])
            tokens, fused, place = self._entries(first, *here, min(width, behind))
            self._layer(tokens, fused, place, self._extent(rows, 0), *self._cache(), start)
            np.minimum(known + width, end, out=known)
        return max(1, behind)

    def _entries(self, first: Tensor, tokens: Tensor, features: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """`width` entries of each row from `first` [N] on: their tokens, fused features [N, width, H] and places."""
        count, capacity = first.shape[0], features.shape[1]
        place = (first[:, None] + torch.arange(width, device=first.device)).clamp(max=capacity - 2)
        index = torch.arange(count, device=first.device)[:, None] * capacity + place
        true = features[:count].flatten(0, 1)[index, : self.fused_width]
        return tokens[:count].gather(1, place + 1), self.head.fuse(true), place

    def _first(
        self,
        known: Tensor,
        tokens: Tensor,
        features: Tensor,
        length: Tensor,
        noise: Tensor | None,
        temperature: float,
        width: int,
        extent: int,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Guess:
        """The first guess of the rows 0..B-1 after the `width` entries from `known` [B] on have been read; the last
        before their `length` must be among them."""
        ids, fused, place = self._entries(known, tokens, features, width)
        hidden = self._layer(ids, fused, place, extent, keys, values)
        at = length[: known.shape[0]] - 1 - known
        last = hidden.gather(1, at.clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[2]))
        return self._guess(torch.where(at[:, None, None] >= 0, last, 0.0), noise, temperature)

    def _next(
        self,
        ids: Tensor,
        hidden: Tensor,
        place: Tensor,
        noise: Tensor | None,
        temperature: float,
        extent: int,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Guess:
        """The guess after `ids` [B, 1], themselves guessed from `hidden` [B, 1, H], at the entries `place` [B, 1]."""
        return self._guess(self._layer(ids, hidden, place, extent, keys, values), noise, temperature)

    def _layer(
        self,
        tokens: Tensor,
        hidden: Tensor,
        place: Tensor,
        extent: int,
        keys: list[Tensor],
        values: list[Tensor],
        start: int = 0,
    ) -> Tensor:
        """One pass of the layer over `tokens` and `hidden` at entries `place` [N, T] of the slots from `start` on;
        extends the head's own cache."""
        if self.lean is not None and start == 0 and tokens.shape[1] <= LEAN_WIDTH:
            return self.lean(tokens, hidden, place, extent, self.cache)
        window = SlotWindow(keys, values, keys[0].shape[::2], start, place, extent)
        q, k, v = self.head.project(self.view.embed(tokens).to(hidden.dtype), hidden, place)
        known, read = window.update(k, v, 0)
        mask = causal_mask(place, extent)
        attended = F.scaled_dot_product_attention(q, known, read, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return self.head.combine(attended, hidden)

    def _guess(self, hidden: Tensor, noise: Tensor | None, temperature: float) -> Guess:
        """The head's own Gumbel-max sample under the target's `noise` [B, N]."""
        scores = F.linear(self.head.norm(hidden[:, 0]), self.output_rows).float() / temperature
        chosen = draw_among(scores, noise, self.view.draft_ids, self.view.config.vocab_size)
        return Guess(self.view.to_target(chosen)[:, None], scores, hidden)

    def _extent(self, rows: Rows, ahead: int) -> int:
        longest = int(rows.lengths[: rows.count].max()) + ahead
        return min(rounded_up(max(longest, 1)), rows.capacity)

    def copy(self, rows: Rows, source: Slots, target: Slots) -> None:
        extent = int(rows.lengths[target.host].max())
        self.features[target.device, :extent] = self.features[source.device, :extent]
        self._copy(rows, source, target, extent)

    def finish(self, rows: Rows, slots: Slots) -> None:
        if self.buffer is None:
            return
        for slot in slots.host.tolist():
            length, start, first = (int(known[slot]) for known in (rows.lengths, rows.starts, self.taken))
            tokens, features = rows.tokens[slot, first : length + 1], self.features[slot, first:length]
            self.buffer.add(tokens.clone(), features.clone(), start - first)
