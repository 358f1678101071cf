"""The draft head at run time: catches up with the committed tokens, then guesses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spec_rollout.draft.eagle import EagleHead
from spec_rollout.draft.features import FeatureBuffer
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.engine.gumbel_max import draw_among
from spec_rollout.engine.kv_cache import SlotCache, causal_mask
from spec_rollout.engine.rejection import Proposal
from spec_rollout.engine.rows import Rows

CATCH_UP_TOKENS = 8192
"""Most tokens, over all rows, of one catch-up pass."""

EXTENT_STEP = 32


class EagleDrafter:
    """Guesses with an `EagleHead`.

    Entry p of a slot pairs token p + 1 with the target's feature at p. `known` entries of a slot have been through the
    head with true features; the rest, left by plain decoding or rejected guesses, is caught up in one pass.

    Args:
        head: the draft head, in the policy's dtype.
        view: the policy's embedding and output head.
        buffer: takes the features of finished rows; None collects nothing.
    """

    def __init__(self, head: EagleHead, view: PolicyView, buffer: FeatureBuffer | None = None):
        self.head, self.view, self.buffer = head, view, buffer
        self.ready = False
        """False until the head has been trained or loaded: it then only collects."""
        self.cache = SlotCache()
        self.features = None
        self._scores: list[Tensor] = []
        """Of the last guesses, [B, Vd] each."""
        self.fused_width = len(head.config.aux_layers) * head.config.hidden_size

    @property
    def shape(self) -> dict:
        """What the time of a guess depends on."""
        own, ids = self.head.own_output, self.view.draft_ids
        rows = len(own) if own is not None else self.head.config.vocab_size if ids is None else len(ids)
        return self.head.config.to_dict() | {"output_rows": rows}

    def begin(self, rows: Rows) -> None:
        width = self.fused_width + self.head.config.hidden_size
        dtype = self.head.fc.weight.dtype
        wanted = (rows.slots, rows.capacity, width)
        if self.features is None or self.features.shape != wanted or self.features.dtype != dtype:
            self.features = torch.zeros(wanted, dtype=dtype, device=rows.device)
        self.cache.allocate(rows.slots, rows.capacity)
        self.known = np.zeros(rows.slots, dtype=np.int64)
        own = self.head.own_output
        self.output_rows = (self.view.output_rows() if own is None else own.detach()).to(dtype)

    def observe(self, rows: Rows, slots: tuple[int, int], start: Tensor, hidden: Sequence[Tensor]) -> None:
        kept = torch.cat([*(hidden[i] for i in self.head.config.aux_layers), hidden[-1]], -1)  # [N, T, F]
        first = torch.arange(*slots, device=rows.device) * rows.capacity + start
        index = first[:, None] + torch.arange(kept.shape[1], device=rows.device)
        flat = self.features.view(-1, self.features.shape[-1])
        flat.index_copy_(0, index.flatten(), kept.flatten(0, 1).to(flat.dtype))

    def admit(self, rows: Rows, slots: tuple[int, int]) -> None:
        self.known[slots[0] : slots[1]] = 0
        if self.ready:
            self._catch_up(rows, *slots)

    def propose(self, rows: Rows, gamma: int, noise: Tensor | None, temperature: float) -> Tensor:
        self._scores = []
        hidden = self._catch_up(rows, 0, rows.count)
        length = rows.length[: rows.count, None]
        guesses = [self._guess(hidden, noise, 0, temperature)]
        for i in range(1, gamma):
            place = length + (i - 1)
            extent = self._extent(rows, i)
            hidden = self._pass((0, rows.count), guesses[-1], hidden, place, extent)
            guesses.append(self._guess(hidden, noise, i, temperature))
        return torch.cat(guesses, 1)

    def proposal(self) -> Proposal:
        return Proposal(torch.stack(self._scores, 1), self.view.draft_ids)

    def _catch_up(self, rows: Rows, start: int, stop: int) -> Tensor:
        """Run the entries up to each row's committed length; returns the head's hidden state [N, 1, H] at the last."""
        slots = slice(start, stop)
        self.known[slots] = np.clip(self.known[slots], 0, np.maximum(rows.lengths[slots] - 1, 0))  # the last is wanted
        behind = rows.lengths[slots] - self.known[slots]
        width = max(1, min(int(behind.max()), CATCH_UP_TOKENS // (stop - start)))
        last = torch.zeros(
            stop - start, 1, self.head.config.hidden_size, device=rows.device, dtype=self.features.dtype
        )
        extent = self._extent(rows, 0)
        while True:
            known = torch.from_numpy(self.known[slots]).to(rows.device)
            place = (known[:, None] + torch.arange(width, device=rows.device)).clamp(max=rows.capacity - 2)
            index = torch.arange(start, stop, device=rows.device)[:, None] * rows.capacity + place
            features = self.features.view(-1, self.features.shape[-1])[index, : self.fused_width]
            tokens = rows.tokens[slots].gather(1, place + 1)
            hidden = self._pass((start, stop), tokens, self.head.fuse(features), place, extent)
            at = rows.length[slots] - 1 - known
            here = (at >= 0) & (at < width)
            found = hidden.gather(1, at.clamp(0, width - 1)[:, None, None].expand_as(last))
            last = torch.where(here[:, None, None], found, last)
            self.known[slots] = np.minimum(self.known[slots] + width, rows.lengths[slots])
            if (self.known[slots] == rows.lengths[slots]).all():
                return last

    def _pass(self, slots: tuple[int, int], tokens: Tensor, hidden: Tensor, place: Tensor, extent: int) -> Tensor:
        """One pass of the layer over `tokens` and `hidden` at entries `place` [N, T]; extends the head's own cache."""
        q, k, v = self.head.project(self.view.embed(tokens).to(hidden.dtype), hidden, place)
        keys, values = self.cache.window(*slots, place, extent).update(k, v, 0)
        attended = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=causal_mask(place, extent), enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.head.combine(attended, hidden)

    def _guess(self, hidden: Tensor, noise: Tensor | None, index: int, temperature: float) -> Tensor:
        """Guesses [B, 1]: the head's own Gumbel-max sample under the target's noise."""
        scores = F.linear(self.head.norm(hidden[:, 0]), self.output_rows).float() / temperature
        noise = None if noise is None else noise[:, index]
        self._scores.append(scores)
        chosen = draw_among(scores, noise, self.view.draft_ids, self.view.config.vocab_size)
        return self.view.to_target(chosen)[:, None]

    def _extent(self, rows: Rows, ahead: int) -> int:
        longest = int(rows.lengths[: rows.count].max()) + ahead
        return min(-(-max(longest, 1) // EXTENT_STEP) * EXTENT_STEP, rows.capacity)

    def copy(self, rows: Rows, source: Tensor, target: Tensor) -> None:
        extent = int(rows.lengths[target.cpu().numpy()].max())
        self.features[target, :extent] = self.features[source, :extent]
        self.cache.copy(source, target, extent)
        src, dst = source.cpu().numpy(), target.cpu().numpy()
        self.known[dst] = np.minimum(self.known[src], rows.lengths[dst])

    def finish(self, rows: Rows, slots: Tensor) -> None:
        if self.buffer is None:
            return
        for slot in slots.tolist():
            length, start = int(rows.lengths[slot]), int(rows.starts[slot])
            self.buffer.add(rows.tokens[slot, : length + 1].clone(), self.features[slot, :length].clone(), start)
