"""The passes of a draft head over the slots of a rollout."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spec_rollout.draft.eagle import EagleHead
from spec_rollout.draft.lean_head import GraphedHead, LeanHead, lean_head, programs_of
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.window import Window
from spec_rollout.engine.compiled import Compiled
from spec_rollout.engine.gumbel_max import draw_among
from spec_rollout.engine.kv_cache import SlotCache, SlotWindow
from spec_rollout.engine.masks import causal_mask

LEAN_WIDTH = 16
"""Most tokens of a row in a lean pass of the head: what a step leaves behind. The mask of a wider one would outgrow
the keys and values that it saves from being copied."""


class Guess(NamedTuple):
    """One guess per row: tokens [N, 1] of the target's vocabulary, their scores [N, Vd] float32 among the others, and
    the head's hidden state [N, 1, H] that they came from."""

    tokens: Tensor
    scores: Tensor
    hidden: Tensor


class HeadPasses:
    """What `head` computes, in a rollout, on keys and values of its own.

    Args:
        head: the draft head, in the policy's dtype.
        view: the policy's embedding and output head.
        window: where the features are.
        compiled: as `compile_passes`; by halves of the layer, kept in `folder`, or whole functions.
    """

    def __init__(self, head: EagleHead, view: PolicyView, window: Window, compiled: str, folder: str | None):
        self.head, self.view, self.window = head, view, window
        self.cache = SlotCache()
        self.fused_width = head.fused_width
        self.compiled, self.folder = compiled, folder
        self.lean: LeanHead | GraphedHead | None = None
        self.output_rows: Tensor | None = None
        self.first, self.next = self._first, self._next
        if compiled == "true" and not programs_of(head, view, folder, wait=False):
            self.first, self.next = (Compiled(f, "the draft head") for f in (self._first, self._next))

    def take_weights(self) -> None:
        """Compute with the weights of now."""
        own = self.head.own_output
        rows = self.view.output_rows() if own is None else own.detach()
        self.output_rows = rows.to(self.head.fc.weight.dtype)
        whole = isinstance(self.first, Compiled)
        self.lean = None if whole else lean_head(self.head, self.view, self.compiled, self.folder)

    def release(self) -> None:
        """Give back what a rollout took."""
        self.cache.release()
        self.output_rows = self.lean = None

    def _cache(self) -> tuple[list[Tensor], list[Tensor]]:
        """The head's keys and values, made at their first use."""
        cache, config = self.cache, self.head.config
        if not cache.keys:
            size = (cache.slots, config.num_key_value_heads, cache.capacity, config.head_dim)
            weight = self.head.fc.weight
            cache.keys, cache.values = [weight.new_zeros(size)], [weight.new_zeros(size)]
        return cache.keys, cache.values

    def _entries(
        self, first: Tensor, tokens: Tensor, kept: Tensor, prompt: Tensor, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`width` entries of each row from `first` [N] on: their tokens, fused features [N, width, H] and places."""
        count, window = first.shape[0], self.window
        place = (first[:, None] + torch.arange(width, device=first.device)).clamp(max=tokens.shape[1] - 2)
        at = window.at(place, prompt[:count])
        index = torch.arange(count, device=first.device)[:, None] * kept.shape[1] + at
        true = kept[:count].flatten(0, 1)[index, : self.fused_width]
        return tokens[:count].gather(1, place + 1), self.head.fuse(true), place

    def _first(
        self,
        known: Tensor,
        tokens: Tensor,
        kept: Tensor,
        prompt: Tensor,
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
        ids, fused, place = self._entries(known, tokens, kept, prompt, width)
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

    def _put(self, tokens: Tensor, hidden: Tensor, place: Tensor, extent: int, start: int) -> None:
        """Extend the head's own cache by entries that nothing is guessed from, as in `_layer`: a single layer's keys
        and values need no attention."""
        cache = self._cache()
        window = SlotWindow(*cache, cache[0][0].shape[::2], start, place, extent)
        _, k, v = self.head.project(self.view.embed(tokens).to(hidden.dtype), hidden, place)
        window.update(k, v, 0)

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
        size = keys[0].shape[::2] if keys else (self.cache.slots, self.cache.capacity)
        window, mask = SlotWindow(keys, values, size, start, place, extent), causal_mask(place, extent)
        return self._through(self.view.embed(tokens).to(hidden.dtype), hidden, place, mask, window)

    def _through(self, embeds: Tensor, hidden: Tensor, place: Tensor, mask: Tensor, window: SlotWindow) -> Tensor:
        """The layer itself; `mask` [N, 1, T, E] says what of the `window`, after this pass, each token sees."""
        q, k, v = self.head.project(embeds, hidden, place)
        known, read = window.update(k, v, 0)
        attended = F.scaled_dot_product_attention(q, known, read, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return self.head.combine(attended, hidden)

    def _guess(self, hidden: Tensor, noise: Tensor | None, temperature: float) -> Guess:
        """The head's own Gumbel-max sample under the target's `noise` [B, N]."""
        last = hidden[:, 0]
        if isinstance(self.lean, LeanHead):
            scores = self.lean.scores(last, self.output_rows).float()
        else:
            scores = F.linear(self.head.norm(last), self.output_rows).float()
        scores = scores if temperature == 1 else scores / temperature
        chosen = draw_among(scores, noise, self.view.draft_ids, self.view.config.vocab_size)
        return Guess(self.view.to_target(chosen)[:, None], scores, hidden)
