"""A small causal language model that guesses for the policy: one that shares the policy's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spec_rollout.draft.collecting import Collecting
from spec_rollout.draft.collector import Collector
from spec_rollout.draft.drafter import CATCH_UP_TOKENS
from spec_rollout.draft.entries import Entries
from spec_rollout.engine.attention_choice import attend
from spec_rollout.engine.gumbel_max import draw_among
from spec_rollout.engine.kept_slot import KeptSlot
from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.engine.rejection import Proposal
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.target import Target
from spec_rollout.engine.transfers import Slots, upload

LEFT = 4
"""Most committed tokens that the pass of the first guess reads besides the newest; its logits take memory for each."""


class ModelDrafter(Entries, Collecting):
    """Guesses with `model`, which is not trained, while the head's `collector` goes on gathering features.

    Entry p of a slot holds the model's keys and values of token p. The first `known` entries of a slot are those of
    committed tokens; the rest, left by plain decoding or rejected guesses, is read in one pass.
    """

    def __init__(self, model: Target, collector: Collector | None = None):
        super().__init__(collector)
        self.model = model
        self.cache = SlotCache()
        self.shape = model.config.to_dict()
        self._bytes = 0
        """Of the model's own keys and values, for each token."""
        self._scores: list[Tensor] = []
        found = {id(m.config): m.config for m in model.model.modules() if hasattr(m, "_supports_sdpa")}
        self._configs = list(found.values())
        self._own = [config._attn_implementation for config in self._configs]

    def slot_bytes(self, capacity: int) -> int:
        return capacity * self._bytes + super().slot_bytes(capacity)

    def begin(self, rows: Rows) -> None:
        self._take_pass()
        self.cache.allocate(rows.slots, rows.capacity, (self.model.dtype, self.model.device))
        self._begin(rows)
        super().begin(rows)

    def end(self) -> None:
        super().end()
        self.cache.release()
        self.model._lean = None
        self._scores = []

    def resize(self, rows: Rows, kept: int) -> None:
        self.model.confine(rows.capacity)
        self.cache.resize(len(rows.tokens), rows.capacity, kept)
        super().resize(rows, kept)

    def _take_pass(self) -> None:
        """Decode by what is proven for the model; nobody else runs it, so that it may stay so between the verbs."""
        attend(self._configs, self._own)
        with self.model.rollout():
            self._bytes, _ = self.model.cache_bytes
            lean, proven = self.model._lean, [config._attn_implementation for config in self._configs]
        self.model._lean = lean
        attend(self._configs, proven)

    def admit(self, rows: Rows, slots: tuple[int, int]) -> None:
        self._read_until(rows, *slots, 0)
        super().admit(rows, slots)

    def keep(self, rows: Rows, slots: Slots) -> list[KeptSlot | None]:
        return self._keep(rows, slots)

    def enter(self, rows: Rows, slots: tuple[int, int], taken: np.ndarray, kept: list[KeptSlot | None]) -> None:
        self._enter(slots, taken, kept)
        super().enter(rows, slots, taken, kept)

    def propose(self, rows: Rows, gamma: int, noise: Tensor | None, temperature: float) -> Tensor:
        """Fewer guesses, or none, where a row nears the end of the model's context."""
        count, longest = rows.count, int(rows.lengths[: rows.count].max())
        if self.model.context is not None:
            gamma = max(0, min(gamma, self.model.context - longest - 1))
        self._scores = []
        if not gamma:
            return rows.tokens[:count, :0]
        width = self._read_until(rows, 0, count, LEFT) + 1
        known, length = upload(self.known[:count], rows.device), rows.length[:count]
        place = self._places(rows, known, width)
        logits = self._forward(rows.tokens[:count].gather(1, place), place, longest)
        last = (length - known)[:, None, None].expand(-1, 1, logits.shape[2])
        guesses = [self._guess(logits.gather(1, last), noise, 0, temperature)]
        for i in range(1, gamma):
            logits = self._forward(guesses[-1], length[:, None] + i, longest + i)
            guesses.append(self._guess(logits, noise, i, temperature))
        self.known[:count] = rows.lengths[:count] + gamma  # `observe` takes back those that did not come true
        return torch.cat(guesses, 1)

    def _read_until(self, rows: Rows, start: int, stop: int, most: int) -> int:
        """Read committed tokens of slots start..stop-1 until none has more than `most` left. Returns how many the slot
        with the most has left."""
        lengths, known = rows.lengths[start:stop], self.known[start:stop]
        np.minimum(known, lengths, out=known)
        width = max(1, CATCH_UP_TOKENS // (stop - start))
        while (behind := int((lengths - known).max())) > most:
            place = self._places(rows, upload(known, rows.device), min(width, behind))
            self._forward(rows.tokens[start:stop].gather(1, place), place, int(lengths.max()), start, keep_logits=1)
            np.minimum(known + width, lengths, out=known)
        return behind

    def _places(self, rows: Rows, first: Tensor, width: int) -> Tensor:
        """`width` entries [N, width] of each row from `first` [N] on; those past its newest token are read in vain."""
        return (first[:, None] + torch.arange(width, device=rows.device)).clamp(max=rows.capacity - 1)

    def _forward(self, ids: Tensor, place: Tensor, last: int, start: int = 0, keep_logits: int = 0) -> Tensor:
        """Logits [N, T, V] of `ids` [N, T] at the entries `place` [N, T], of which `last` is the last that counts, of
        the slots from `start` on."""
        slots, extent = (start, start + len(ids)), self.cache.extent(last + 1)
        return self.model.forward(self.cache, slots, ids, place, extent, keep_logits)[0]

    def _guess(self, logits: Tensor, noise: Tensor | None, place: int, temperature: float) -> Tensor:
        self._scores.append(logits[:, -1].float() / temperature)
        lane = None if noise is None else noise[:, place]
        return draw_among(self._scores[-1], lane, None, logits.shape[-1])[:, None]

    def proposal(self) -> Proposal:
        return Proposal(torch.stack(self._scores, 1), None)

    def observe(self, rows: Rows, slots: tuple[int, int], start: Tensor, hidden: Sequence[Tensor]) -> None:
        here = slice(*slots)
        np.minimum(self.known[here], rows.lengths[here], out=self.known[here])
        super().observe(rows, slots, start, hidden)

    def copy(self, rows: Rows, source: Slots, target: Slots) -> None:
        self._copy(rows, source, target, int(rows.lengths[target.host].max()) + 1)
        super().copy(rows, source, target)
