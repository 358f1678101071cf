"""Where a row that enters begins: behind what other rows have read of the same tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from spec_rollout.engine.guarded_drafter import GuardedDrafter
from spec_rollout.engine.kept_rows import KeptRow, KeptRows
from spec_rollout.engine.kept_slot import KeptSlot, Put
from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.engine.prefixes import Sequences, packed
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.transfers import on_both_sides
from spec_rollout.records import Request

LEAST = 16
"""Fewer tokens than this are read again: that takes no longer than to copy what was made of them, layer by layer."""
LEAST_WAITED_FOR = 128
"""A row that has to wait for another one's tokens costs a pass more. Reading so many takes about as long."""


class Beginning(NamedTuple):
    """The first `tokens` of a row are those of `source`: a kept row, or the active one of the request with that
    index."""

    tokens: int = 0
    source: KeptRow | int | None = None


class Beginnings:
    """Finds what there is of the tokens of requests, and takes it into their slots.

    Of c tokens in common the first c - 1 are taken: what a draft head keeps for a token was made of the next one, too.
    And a row's last two tokens are read in any case, for a head to begin from. A recurrent state cannot be cut: rows
    that have one go on from the end of a kept row, or read all their tokens.
    """

    def __init__(self, kept: KeptRows | None, recurrent: bool, *, cache: SlotCache, rows: Rows, draft: GuardedDrafter):
        self.kept, self.recurrent = KeptRows() if kept is None else kept, recurrent
        self.cache, self.rows, self.draft = cache, rows, draft
        self._packed: dict[int, bytes] = {}
        """Prompts but for the last token, by the index of their request."""
        self._active: Sequences[int] = Sequences()
        self._entering: dict[int, Beginning] = {}
        self._taken_out: set[int] = set()
        """Slots whose keys and values come from kept rows that have been taken out."""

    def look_at(self, active: list[Request]) -> None:
        """The requests of the rows that sit in the slots, from the first on; all have been read."""
        self._active, self._entering = Sequences(), {}
        for request in [] if self.recurrent else active:
            self._active.add(self._prompt(request), request.index)

    def find(self, request: Request) -> Beginning | None:
        """Where the row of `request` can begin; None where it had better wait until a row that enters is read."""
        best = self._of_kept(request)
        if self.recurrent:
            return best
        index, size = self._active.most_alike(self._prompt(request))
        found = Beginning(size - 1, index)
        if index in self._entering:
            its = self._entering[index]
            if found.tokens - max(its.tokens, best.tokens) >= LEAST_WAITED_FOR:
                return None
            found = Beginning(min(its.tokens, found.tokens), its.source)
        return found if found.tokens >= LEAST and found.tokens > best.tokens else best

    def enter(self, request: Request, beginning: Beginning) -> None:
        """The row of `request` enters, to be read from its `beginning` on."""
        if not self.recurrent:
            self._entering[request.index] = beginning
            self._active.add(self._prompt(request), request.index)

    def take_out(self, first: int, beginnings: list[Beginning]) -> list[Put]:
        """What rows that enter the slots from `first` on take of kept rows of which one of them takes all. These are
        kept no more: the row that goes on from one will be, in its place."""
        kept = [
            (slot, tokens, source)
            for slot, (tokens, source) in enumerate(beginnings, start=first)
            if isinstance(source, KeptRow) and source in self.kept
        ]
        whole = {source for _, tokens, source in kept if tokens == source.slot.tokens}
        puts = [Put(slot, source.slot, tokens) for slot, tokens, source in kept if source in whole]
        self._taken_out = {put.slot for put in puts}
        for row in whole:
            self.kept.drop(row)
        return puts

    def take(self, active: list[Request], slots: tuple[int, int], beginnings: list[Beginning]) -> np.ndarray:
        """Put what the `beginnings` are of into the slots slots[0]..slots[1] - 1, but for keys and values of what was
        taken out. `active` are the requests in the slots. Returns for each how many tokens are there; none of a kept
        row that has given way meanwhile."""
        taken = np.zeros(len(beginnings), dtype=np.int64)
        parts: list[KeptSlot | None] = [None] * len(beginnings)
        places = {request.index: slot for slot, request in enumerate(active[: slots[0]])}
        moves: list[tuple[int, int]] = []
        puts: list[Put] = []
        for i, (slot, (tokens, source)) in enumerate(zip(range(*slots), beginnings, strict=True)):
            if isinstance(source, KeptRow):
                if slot not in self._taken_out:
                    if source not in self.kept:
                        continue
                    puts.append(Put(slot, source.slot, tokens))
                self.cache.states.put(slot, source.slot.convolutions, source.slot.states)
                parts[i] = self.draft.part(source.draft)
            elif source is not None:
                moves.append((places[source], slot))
            taken[i] = tokens
        self.cache.put(puts)
        if moves:
            src, dst = (on_both_sides(side, self.rows.device) for side in zip(*moves, strict=True))
            self.cache.copy(src.device, dst.device, int(taken[dst.host - slots[0]].max()))
            self.draft.call("copy", self.rows, src, dst)
        self.draft.enter(self.rows, slots, taken, parts)
        self._entering = {}
        beginnings.clear()  # what was taken out takes memory no more
        return taken

    def _of_kept(self, request: Request) -> Beginning:
        if not len(self.kept):
            return Beginning()
        row, size = self.kept.find(self._prompt(request), whole=self.recurrent)
        return Beginning(size - 1, row) if size > LEAST and self.draft.takes(self.rows, row.draft) else Beginning()

    def _prompt(self, request: Request) -> bytes:
        if request.index not in self._packed:
            self._packed[request.index] = packed(request.prompt[:-1])
        return self._packed[request.index]
