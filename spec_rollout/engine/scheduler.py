"""Which request sits in which slot: admission by groups, compaction when rows finish."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from spec_rollout.records import Request


@dataclass
class Admission:
    """Requests that enter the slots first, first + 1, …: `fresh` are prefilled, the rest copy a slot of their group.

    `source[i]` is the slot that slot first + len(fresh) + i copies.
    """

    first: int
    fresh: list[Request]
    siblings: list[Request]
    source: list[int]

    @property
    def requests(self) -> list[Request]:
        return self.fresh + self.siblings

    def passes(self, most: int) -> Iterator[tuple[tuple[int, int], int]]:
        """The slots (start, stop) of the fresh requests, pass by pass, each with the most prompt tokens but the last
        of any of them: at most `most` tokens a pass, padding included, unless a single prompt is longer. Prompts of
        one token need none."""
        lengths = [len(request.prompt) - 1 for request in self.fresh]
        start = 0
        while start < len(lengths):
            stop = start + 1
            while stop < len(lengths) and max(lengths[start : stop + 1]) * (stop + 1 - start) <= most:
                stop += 1
            width = max(lengths[start:stop])
            if width:
                yield (self.first + start, self.first + stop), width
            start = stop


class Scheduler:
    """Keeps the active rows a contiguous prefix of the slots. Host side only.

    Where a slot still `keeps_prompts` once its row has moved on, as keys and values do and recurrent states do not, a
    request copies any active row with its prompt; else only one that enters with it.
    """

    def __init__(self, requests: list[Request], slots: int, keeps_prompts: bool = True):
        self.waiting = deque(requests)
        self.slots, self.keeps_prompts = slots, keeps_prompts
        self.active: list[Request] = []
        """The request in each active slot."""

    @property
    def done(self) -> bool:
        return not self.waiting and not self.active

    def admit(self) -> Admission | None:
        """Move waiting requests into the free slots; None when nothing can move."""
        first = len(self.active)
        entering = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.slots - first))]
        if not entering:
            return None
        old = self.active if self.keeps_prompts else []
        slot_of = {tuple(request.prompt): slot for slot, request in enumerate(old)}
        fresh, siblings = [], []
        for request in entering:
            group = tuple(request.prompt)
            (siblings if group in slot_of else fresh).append(request)
            slot_of.setdefault(group, first + len(fresh) - 1)
        self.active += fresh + siblings
        return Admission(first, fresh, siblings, [slot_of[tuple(r.prompt)] for r in siblings])

    def release(self, finished: list[int]) -> tuple[list[int], list[int]]:
        """Free the slots `finished`; returns (source, target) slots of the rows that move to keep the prefix whole."""
        gone = set(finished)
        count = len(self.active) - len(gone)
        target = sorted(slot for slot in gone if slot < count)
        source = [slot for slot in range(count, len(self.active)) if slot not in gone]
        for s, t in zip(source, target, strict=True):
            self.active[t] = self.active[s]
        del self.active[count:]
        return source, target
