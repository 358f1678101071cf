"""Which request sits in which slot: admission by groups, compaction when rows finish."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from spec_rollout.engine.beginnings import Beginning, Beginnings
from spec_rollout.records import Request


@dataclass
class Admission:
    """Requests that enter the slots first, first + 1, …: `fresh` are prefilled from their `beginnings` on, the rest
    copy a slot of their group.

    `source[i]` is the slot that slot first + len(fresh) + i copies.
    """

    first: int
    fresh: list[Request]
    siblings: list[Request]
    source: list[int]
    beginnings: list[Beginning] = field(default_factory=list)

    @property
    def requests(self) -> list[Request]:
        return self.fresh + self.siblings

    def copies(self, of_fresh: bool, moved: int = 0) -> tuple[list[int], list[int]]:
        """Source and target slots of the siblings that copy fresh rows, or of those that copy rows that were active;
        all that entered have `moved` so many slots to the front since."""
        slots = enumerate(self.source, start=self.first + len(self.fresh))
        pairs = [(s - moved, slot - moved) for slot, s in slots if (s >= self.first) == of_fresh]
        return [s for s, _ in pairs], [slot for _, slot in pairs]


class Scheduler:
    """Keeps the active rows a contiguous prefix of the slots. Host side only.

    Where a slot still `keeps_prompts` once its row has moved on, as keys and values do and recurrent states do not, a
    request copies any active row with its prompt; else only one that enters with it.
    """

    def __init__(self, requests: list[Request], slots: int, keeps_prompts: bool = True):
        self.waiting = deque(requests)
        self.slots, self.keeps_prompts = slots, keeps_prompts
        self.active: list[Request] = []
        """The request in each slot that is taken."""
        self.known: dict[int, int] = {}
        """Tokens known of the waiting requests, by index, that have had a slot before."""

    @property
    def done(self) -> bool:
        return not self.waiting and not self.active

    def admit(
        self,
        fits: Callable[[int, int], bool] | None = None,
        most: int | None = None,
        beginnings: Beginnings | None = None,
    ) -> Admission | None:
        """Move waiting requests into the free slots; None when nothing can move.

        Nobody overtakes, but for those that wait for a row that enters: the first that may not enter holds up those
        behind it.

        Args:
            fits: says whether so many rows can be there, the entering ones of at most so many tokens; the first row
                always enters.
            most: tokens that may be read for all that enter, padding included, unless it is a single prompt. None
                lets all enter.
            beginnings: finds what need not be read; None reads all.
        """
        first = len(self.active)
        if not self.waiting or first == self.slots:  # as in most steps
            return None
        if first and fits is not None and not fits(first + 1, self.tokens(self.waiting[0])):  # nor may the first
            return None
        old = self.active if self.keeps_prompts else []
        slot_of = {tuple(request.prompt): slot for slot, request in enumerate(old)}
        fresh, siblings, found, held = [], [], [], []
        longest = to_read = 0
        while self.waiting and first + len(fresh) + len(siblings) < self.slots:
            request = self.waiting[0]
            tokens = self.tokens(request)
            longest = max(longest, tokens)
            rows = first + len(fresh) + len(siblings) + 1
            if rows > 1 and fits is not None and not fits(rows, longest):
                break
            group = tuple(request.prompt)
            if group in slot_of and request.index not in self.known:
                siblings.append(self.waiting.popleft())
                continue
            if beginnings is not None and not fresh:
                beginnings.look_at(self.active)
            beginning = Beginning() if beginnings is None else beginnings.find(request)
            if beginning is None:
                held.append(self.waiting.popleft())
                continue
            to_read = max(to_read, tokens - beginning.tokens)
            if fresh and most is not None and to_read * (len(fresh) + 1) > most:
                break
            fresh.append(self.waiting.popleft())
            found.append(beginning)
            if beginnings is not None:
                beginnings.enter(request, beginning)
            if self.keeps_prompts or request.index not in self.known:
                slot_of.setdefault(group, first + len(fresh) - 1)
        self.waiting.extendleft(reversed(held))
        if not fresh and not siblings:
            return None
        self.active += fresh + siblings
        return Admission(first, fresh, siblings, [slot_of[tuple(r.prompt)] for r in siblings], found)

    def tokens(self, request: Request) -> int:
        """The tokens that a waiting `request` begins with: its prompt, or what was known of it when it gave way."""
        return self.known.get(request.index, len(request.prompt))

    def put_back(self, slots: list[int], known: list[int]) -> tuple[list[int], list[int]]:
        """The rows in `slots` wait again, before all others and in their order, with so many `known` tokens each, 0
        where it is the prompt; the rest is as for `release`."""
        requests = sorted((self.active[slot] for slot in slots), key=lambda request: request.index, reverse=True)
        self.waiting.extendleft(requests)
        self.known |= {self.active[s].index: size for s, size in zip(slots, known, strict=True) if size}
        return self.release(slots)

    def release(self, finished: list[int], last: int = 0) -> tuple[list[int], list[int]]:
        """Free the slots `finished`; returns (source, target) slots of the rows that move to keep the prefix whole.
        The `last` rows stay the last ones, in their order."""
        gone = set(finished)
        before, count = len(self.active) - last, len(self.active) - len(gone)
        front = count - last
        pairs = zip(
            [*(slot for slot in range(front, before) if slot not in gone), *range(before, len(self.active))],
            [*sorted(slot for slot in gone if slot < front), *range(front, count)],
            strict=True,
        )
        moves = [(s, t) for s, t in pairs if s != t]
        source, target = [s for s, _ in moves], [t for _, t in moves]
        for t, request in zip(target, [self.active[s] for s in source], strict=True):
            self.active[t] = request
        del self.active[count:]
        return source, target
