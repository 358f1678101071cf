"""The state of every slot, as tensors on the policy's device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spec_rollout.engine.kv_cache import resized
from spec_rollout.engine.transfers import Slots, upload
from spec_rollout.records import Request


@dataclass
class Parked:
    """What is kept of a row that gave way: its `size` known tokens [size], their log-probs, and its counts [7]."""

    size: int
    tokens: Tensor
    logprobs: Tensor
    counts: Tensor


class Rows:
    """Slots 0..count-1 are active. For slot s:

    - tokens [S, C] int64: prompt, emitted tokens, then leftovers; tokens[s, length[s]] is the newest known token
    - length [S] int64: committed positions, that is, those whose keys and values are in the cache
    - start [S] int64: prompt tokens, so the next token to sample is completion token length + 1 - start
    - limit [S] int64: completion tokens that the request may have
    - key [S, 2] int32: the request's noise key
    - request [S] int64: index of the request
    - logprobs [S, C] float32, beside `tokens`
    - drafted, accepted, steps [S] int64: counts over the request's life

    Tokens and log-probs follow the cache's sizes (`resize`); the rest is as it was made.
    """

    token_bytes = 2 * (8 + 4)
    """What a slot takes for each token here, and in the copy that the drafter is shown."""
    COUNTS = ("length", "start", "limit", "request", "drafted", "accepted", "steps")
    MOVED = ("tokens", "logprobs", "key", "counts")

    length: Tensor
    start: Tensor
    limit: Tensor
    request: Tensor
    drafted: Tensor
    accepted: Tensor
    steps: Tensor

    def __init__(self, slots: int, capacity: int, vocab_size: int, device: torch.device):
        self.slots, self.capacity, self.vocab_size, self.device = slots, capacity, vocab_size, device
        self.count = 0
        self.lengths = np.zeros(slots, dtype=np.int64)
        self.starts = np.zeros(slots, dtype=np.int64)
        """`length` and `start`, as the host knows them."""
        self.indices = np.zeros(slots, dtype=np.int64)
        """Index of the request."""
        self.groups = np.zeros(slots, dtype=np.int64)
        """A number that rows with the same prompt share."""
        self.tokens = torch.zeros(slots, capacity, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(slots, capacity, dtype=torch.float32, device=device)
        self.key = torch.zeros(slots, 2, dtype=torch.int32, device=device)
        self.counts = torch.zeros(slots, len(self.COUNTS), dtype=torch.int64, device=device)
        """What COUNTS names, in one piece."""
        for name, column in zip(self.COUNTS, self.counts.unbind(1), strict=True):
            setattr(self, name, column)

    def resize(self, slots: int, capacity: int, kept: int) -> None:
        """Room for `slots` rows of `capacity` tokens from here on; the first `kept` keep what they have."""
        self.capacity = capacity
        self.tokens, self.logprobs = (resized(b, slots, capacity, kept) for b in (self.tokens, self.logprobs))

    def fill(self, first: int, requests: list[Request], parked: Mapping[int, Parked] | None = None) -> None:
        """Slots first.. take `requests`; all but the last prompt token count as committed, or of those that are
        `parked`, by the request's index, all but the last known one."""
        slots = slice(first, first + len(requests))
        width = max(len(r.prompt) for r in requests)
        # Padding repeats a token of the row itself: another one's embedding might be NaN, which no mask takes away.
        tokens = np.array([[*r.prompt, *[r.prompt[-1]] * (width - len(r.prompt))] for r in requests])
        self.tokens[slots, :width] = upload(tokens, self.device)
        columns = np.array([(len(r.prompt), r.max_new_tokens, r.index, *r.key) for r in requests])
        start, limit, request, key0, key1 = upload(columns, self.device).unbind(1)
        self.start[slots], self.limit[slots], self.request[slots] = start, limit, request
        self.length[slots] = start - 1
        self.starts[slots] = [len(r.prompt) for r in requests]
        self.indices[slots] = [r.index for r in requests]
        self.groups[slots] = [hash(tuple(r.prompt)) for r in requests]
        self.lengths[slots] = self.starts[slots] - 1
        self.key[slots] = torch.stack([key0, key1], 1).to(torch.int32)
        for counter in (self.drafted, self.accepted, self.steps):
            counter[slots] = 0
        for slot, request in enumerate(requests, start=first):
            if parked and request.index in parked:
                self._resume(slot, parked[request.index])

    def park(self, slot: int) -> Parked:
        """What the row in `slot` needs to go on later, in another slot."""
        size = int(self.lengths[slot]) + 1
        tokens, logprobs = (x[slot, :size].clone() for x in (self.tokens, self.logprobs))
        return Parked(size, tokens, logprobs, self.counts[slot].clone())

    def _resume(self, slot: int, parked: Parked) -> None:
        self.tokens[slot, : parked.size] = parked.tokens
        self.logprobs[slot, : parked.size] = parked.logprobs
        self.counts[slot] = parked.counts
        self.lengths[slot] = parked.size - 1

    def copy(self, source: Slots, target: Slots) -> None:
        """Slots `target` [N] become copies of slots `source` [N]."""
        for name in self.MOVED:
            state = getattr(self, name)
            state[target.device] = state[source.device]
        for known in (self.lengths, self.starts, self.indices, self.groups):
            known[target.host] = known[source.host]

    def show(self, onlooker: Rows, news: int | None = None) -> Rows:
        """`onlooker`, as large as this, brought up to what its reader may know of the active rows: all but their
        log-probs. Whatever it writes there, it writes to a copy. Only the last `news` known tokens of each row are
        copied, so that a step costs the same in long rows as in short ones; None copies all."""
        onlooker.count, active = self.count, slice(0, self.count)
        if onlooker.tokens.shape != self.tokens.shape:
            onlooker.resize(len(self.tokens), self.capacity, self.count)
        onlooker.lengths[:], onlooker.starts[:] = self.lengths, self.starts
        onlooker.indices[:], onlooker.groups[:] = self.indices, self.groups
        if news is None:
            known = int(self.lengths[active].max(initial=-1)) + 1
            onlooker.tokens[active, :known] = self.tokens[active, :known]
        elif news:
            back = torch.arange(news, device=self.device)
            place = (self.length[active, None] - back).clamp(min=0)
            onlooker.tokens[active].scatter_(1, place, self.tokens[active].gather(1, place))
        onlooker.counts[active], onlooker.key[active] = self.counts[active], self.key[active]
        return onlooker

    def positions(self, width: int) -> Tensor:
        """Positions [B, width] that the active rows' next `width` inputs take."""
        return self.length[: self.count, None] + torch.arange(width, device=self.device)

    def newest(self) -> Tensor:
        """The newest known token [B, 1] of each active row."""
        return self.tokens[: self.count].gather(1, self.length[: self.count, None])

    def progress(self) -> Tensor:
        """Index [B] of the completion token that each active row samples next."""
        return self.length[: self.count] + 1 - self.start[: self.count]
