"""Takes a sample of the target's features out of running rollouts, for the head to learn from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spec_rollout.draft.features import FeatureBuffer
from spec_rollout.draft.spans import CONTEXT, first_entry, span_after
from spec_rollout.draft.window import Window
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.transfers import Slots

READ = 128
"""Entries that go round in a slot's window for a head that guesses: plain decoding costs it one pass for as many
tokens of rows that are longer than the window. A wider pass takes no less time for each token."""
STAGED = 32
"""And where features are only collected: they are copied out that often."""
NEVER = np.iinfo(np.int64).max // 2


class Collector:
    """Shows a `window` over the features of each slot, and copies those of sampled spans into `buffer`.

    Has the verbs of a drafter that do not guess; another drafter hands them on.

    Args:
        layers: the residual stream after that many layers is what the head reads; the final hidden state comes behind.
        like: a weight of the head's width, precision and device, [H].
        buffer: takes the features; None collects nothing.
    """

    def __init__(self, layers: Sequence[int], like: Tensor, buffer: FeatureBuffer | None):
        self.layers, self.like, self.buffer = layers, like, buffer
        self.window = Window()
        self.reads = False
        self.number = self.copied = self.taken = np.zeros(0, dtype=np.int64)
        """Of each slot the span that its row is in; the entries before which all is in the buffer, NEVER where the
        span is not sampled; and the first ones, which another row had read, so that they are not observed."""

    @property
    def collects(self) -> bool:
        return self.buffer is not None and self.buffer.max_tokens > 0

    def slot_bytes(self, capacity: int, reads: bool = False) -> int:
        """What a slot of `capacity` tokens takes; `reads` as for `begin`."""
        width, context, features = self._sizes(reads)
        return min(capacity, width + context) * features * self.like.itemsize

    def _sizes(self, reads: bool) -> tuple[int, int, int]:
        """Entries of the window that go round, those that stay, and numbers in each."""
        if not (reads or self.collects):
            return 0, 0, 0
        width = READ if reads else STAGED
        return width, CONTEXT if self.collects else 1, (len(self.layers) + self.collects) * len(self.like)

    def begin(self, rows: Rows, reads: bool = False) -> None:
        """`reads` says whether a head will read the window too."""
        self.reads = reads
        width, context, features = self._sizes(reads)
        self.window.release()
        if features:
            self.window.allocate(rows, width, context, self.like.new_empty(features))
        self.number, self.taken = (np.zeros(rows.slots, dtype=np.int64) for _ in range(2))
        self.copied = np.full(rows.slots, NEVER)
        if self.collects:
            self.buffer.begin()

    def end(self) -> None:
        self.window.release()
        if self.collects:
            self.buffer.give_up()

    def resize(self, rows: Rows, kept: int) -> None:
        if self.reads or self.collects:
            self.window.resize(len(rows.tokens), rows.capacity, kept)

    def enter(self, rows: Rows, slots: tuple[int, int], taken: np.ndarray) -> None:
        """Rows begin in slots[0]..slots[1]-1, the first `taken` [N] entries of which are not read here."""
        if not (self.reads or self.collects):
            return
        here = slice(*slots)
        self.taken[here] = self.window.seen[here] = taken
        for row, tokens in zip(rows.indices[here].tolist(), taken.tolist(), strict=True) if self.collects else []:
            span = self.buffer.open.get(row)
            if span is not None and not span.parts:
                span.first = span.copied = max(span.first, tokens)

    def read(self, rows: Rows, slots: tuple[int, int], start: np.ndarray, hidden: Sequence[Tensor]) -> None:
        if not (self.reads or self.collects):
            return
        parts = self.parts(hidden)
        self.window.write_prompt(rows, slots, start, parts)
        if not self.collects:
            return
        # Of rows that have given way in the middle of a span, what they had seen but not left here.
        for n, slot in enumerate(range(*slots)):
            row, end, first = int(rows.indices[slot]), int(self.window.seen[slot]), int(start[n])
            span = self.buffer.open.get(row)
            if span is not None and span.copied < first:
                self.buffer.drop(row)
            elif span is not None and span.copied < end:
                piece = slice(span.copied - first, end - first)
                self.buffer.extend(row, torch.cat([part[n, piece] for part in parts], -1).to(self.like.dtype))
                span.copied = end

    def admit(self, rows: Rows, slots: tuple[int, int]) -> None:
        if not (self.reads or self.collects):
            return
        self.window.seen[slice(*slots)] = rows.lengths[slice(*slots)]
        for slot in range(*slots):
            self._enter(rows, slot)

    def observe(self, rows: Rows, slots: tuple[int, int], start: Tensor, hidden: Sequence[Tensor]) -> None:
        if not (self.reads or self.collects):
            return
        parts, here = self.parts(hidden), slice(*slots)
        width = parts[0].shape[1]
        self.window.fit(rows, width)
        seen = self.window.seen[here]
        for n in np.flatnonzero(self.window.missing(rows, here, self.copied[here], width)):
            self._copy_out(rows, slots[0] + int(n), int(seen[n]))
        self.window.write(rows, slots, start, parts)
        seen[:] = rows.lengths[here]
        if self.collects:
            for n in np.flatnonzero(span_after(rows.starts[here], seen) > self.number[here]):
                self._cross(rows, slots[0] + int(n))

    def copy(self, rows: Rows, source: Slots, target: Slots) -> None:
        if not (self.reads or self.collects):
            return
        self.window.copy(rows, source, target)
        for state in (self.number, self.copied, self.taken):
            state[target.host] = state[source.host]
        for slot in target.host[rows.lengths[target.host] == rows.starts[target.host] - 1].tolist():
            self._enter(rows, slot)

    def finish(self, rows: Rows, slots: Slots) -> None:
        if self.collects:
            for slot in slots.host.tolist():
                self._seal(rows, slot, int(rows.lengths[slot]))
                self.copied[slot] = NEVER

    def parts(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """What is kept of the target's hidden states, each [N, T, H]."""
        return [hidden[i] for i in self.layers] + [hidden[-1]] * self.collects

    def _enter(self, rows: Rows, slot: int) -> None:
        """A row sits in `slot`, new or back again."""
        if not self.collects:
            return
        length, row, prompt = int(rows.lengths[slot]), int(rows.indices[slot]), int(rows.starts[slot])
        span = self.buffer.open.get(row)
        if span is None and length == prompt - 1:
            span = self.buffer.start(row, 0, max(int(first_entry(prompt)), int(self.taken[slot])))
        self.number[slot] = span_after(prompt, length)
        self.copied[slot] = NEVER if span is None else span.copied

    def _cross(self, rows: Rows, slot: int) -> None:
        """The row in `slot` has come to its next span, whose first entry is the last one of the span before."""
        self.number[slot] += 1
        place = int(first_entry(int(rows.starts[slot]), int(self.number[slot])))
        self._seal(rows, slot, place + 1)
        span = self.buffer.start(int(rows.indices[slot]), int(self.number[slot]), place)
        self.copied[slot] = NEVER if span is None else place

    def _seal(self, rows: Rows, slot: int, stop: int) -> None:
        """The sampled span of the row in `slot`, if there is one, ends before the entry `stop`."""
        row, prompt = int(rows.indices[slot]), int(rows.starts[slot])
        span = self.buffer.open.get(row)
        if span is None:
            return
        if stop - max(span.first, prompt - 2) < 2:
            self.buffer.drop(row)  # nothing that was sampled has its target state here
            return
        self._copy_out(rows, slot, stop)
        if row in self.buffer.open:
            tokens = rows.tokens[slot, span.first : stop + 1].clone()
            self.buffer.seal(row, tokens, prompt, span.first, int(rows.groups[slot]))

    def _copy_out(self, rows: Rows, slot: int, stop: int) -> None:
        """Put what is sampled of the entries before `stop` into the buffer."""
        row, start = int(rows.indices[slot]), int(self.copied[slot])
        self.copied[slot] = NEVER
        if row in self.buffer.open and start < stop:
            self.buffer.extend(row, self.window.entries(rows, slot, start, stop))
        if row in self.buffer.open:
            self.buffer.open[row].copied = self.copied[slot] = max(start, stop)


def nobody() -> Collector:
    """One that collects nothing."""
    return Collector((), torch.empty(0), None)
