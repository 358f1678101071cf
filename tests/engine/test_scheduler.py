"""Slots: active rows are a contiguous prefix, nobody is lost, and a group is prefilled once per admission."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from spec_rollout.engine.scheduler import Scheduler
from spec_rollout.records import Request


def requests(prompts) -> list[Request]:
    return [Request(index, prompt, (index, 0), 5) for index, prompt in enumerate(prompts)]


class SchedulerMachine(RuleBasedStateMachine):
    """The scheduler against a naive model: the slots as a list that is filled and emptied by hand."""

    @initialize(
        prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3), min_size=1, max_size=20),
        slots=st.integers(1, 6),
    )
    def start(self, prompts, slots):
        self.requests, self.size = requests(prompts), slots
        self.scheduler = Scheduler(self.requests, slots)
        self.slots: list[int | None] = [None] * slots  # index of the request in each
        self.finished: set[int] = set()
        self.entered = 0

    @rule()
    def admit(self):
        before = [i for i in self.slots if i is not None]
        free, left = self.size - len(before), len(self.requests) - self.entered
        admission = self.scheduler.admit()
        if min(free, left) == 0:
            assert admission is None
            return
        assert admission.first == len(before)
        entering = admission.requests
        assert sorted(r.index for r in entering) == list(range(self.entered, self.entered + min(free, left)))
        self.entered += len(entering)
        for slot, request in enumerate(entering, start=admission.first):
            assert self.slots[slot] is None
            self.slots[slot] = request.index
        # each prompt is prefilled once, and not at all if a row with it is active
        prompts = [tuple(r.prompt) for r in admission.fresh]
        assert len(set(prompts)) == len(prompts)
        assert not set(prompts) & {tuple(self.requests[i].prompt) for i in before}
        # each sibling copies a slot with its own prompt, which is filled before the copy
        assert len(admission.source) == len(admission.siblings)
        first_sibling = admission.first + len(admission.fresh)
        for source, sibling in zip(admission.source, admission.siblings, strict=True):
            assert source < first_sibling
            assert list(self.requests[self.slots[source]].prompt) == list(sibling.prompt)

    @precondition(lambda self: self.scheduler.active)
    @rule(data=st.data())
    def release(self, data):
        count = len(self.scheduler.active)
        gone = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
        order = data.draw(st.permutations(sorted(gone)))
        source, target = self.scheduler.release(list(order))
        assert set(target) <= gone and not set(source) & gone and len(source) == len(target)
        assert all(s >= count - len(gone) > t for s, t in zip(source, target, strict=True))  # only what must move
        self.finished |= {self.slots[slot] for slot in gone}
        for slot in gone:
            self.slots[slot] = None
        for s, t in zip(source, target, strict=True):
            assert self.slots[t] is None
            self.slots[t], self.slots[s] = self.slots[s], None

    @invariant()
    def active_rows_are_a_contiguous_prefix(self):
        active = [r.index for r in self.scheduler.active]
        assert self.slots == active + [None] * (self.size - len(active))

    @invariant()
    def nobody_is_lost_or_doubled(self):
        active, waiting = [r.index for r in self.scheduler.active], [r.index for r in self.scheduler.waiting]
        assert sorted([*self.finished, *active, *waiting]) == list(range(len(self.requests)))
        assert self.scheduler.done == (len(self.finished) == len(self.requests))


SchedulerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=20, deadline=None, derandomize=True)
TestScheduler = SchedulerMachine.TestCase


def test_groups():
    scheduler = Scheduler(requests([[1], [2], [1], [1], [3], [2]]), 4)
    admission = scheduler.admit()
    assert [r.index for r in admission.fresh] == [0, 1] and [r.index for r in admission.siblings] == [2, 3]
    assert admission.first == 0 and admission.source == [0, 0]
    assert scheduler.admit() is None
    assert scheduler.release([0, 2]) == ([3], [0])  # slots then hold requests 3 and 1
    admission = scheduler.admit()
    assert [r.index for r in admission.fresh] == [4] and [r.index for r in admission.siblings] == [5]
    assert admission.first == 2 and admission.source == [1]  # the active row with the same prompt
    assert scheduler.release([0, 1, 2, 3]) == ([], []) and scheduler.done


def test_while_the_first_that_waits_has_no_room_nothing_is_looked_at():
    """A step with rows that wait for memory costs one question, however many there are."""
    asked, read = [], []

    def fits(rows: int, tokens: int) -> bool:
        asked.append((rows, tokens))
        return rows <= 2

    class Prompt(list):
        def __iter__(self):
            read.append(self)
            return super().__iter__()

    scheduler = Scheduler(requests([Prompt(p) for p in ([1], [2], [3, 3], [4])]), 4)
    assert len(scheduler.admit(fits).requests) == 2 and read
    asked.clear()
    read.clear()
    assert scheduler.admit(fits) is None and asked == [(3, 2)] and not read
