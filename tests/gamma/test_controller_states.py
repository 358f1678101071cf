"""What must hold of a controller after any sequence of events."""

from __future__ import annotations

import json
import math

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from spec_rollout.gamma import GammaController
from spec_rollout.records import StepStats
from tests.gamma.simulation import Machine

odd_seconds = st.one_of(st.floats(0, 10), st.sampled_from([0.0, -1.0, math.nan, math.inf, 1e-12]))
counts = st.integers(0, 200)


class ControllerMachine(RuleBasedStateMachine):
    """Any events in any order: γ stays in its bounds, nothing raises, and a reloaded copy decides the same."""

    def __init__(self):
        super().__init__()
        self.controller = self.new()
        self.copy: GammaController | None = None
        self.gamma = 0

    def new(self) -> GammaController:
        return GammaController(Machine().calibrate(np.random.default_rng(0), noise=0.3), 5)

    def both(self):
        return [c for c in (self.controller, self.copy) if c is not None]

    @rule(rows=counts, context=st.integers(0, 5000))
    def choose(self, rows, context):
        self.gamma, *others = (c.choose(rows, context) for c in self.both())
        assert all(other == self.gamma for other in others)
        assert isinstance(self.gamma, int)

    @rule(rows=counts, seconds=odd_seconds, rate=st.floats(0, 1), steps=st.integers(1, 20))
    def decode(self, rows, seconds, rate, steps):
        for _ in range(steps):
            self.choose(rows, 100)
            accepted = [int(rows * rate**k) for k in range(1, self.gamma + 1)]
            for controller in self.both():
                controller.observe(StepStats(rows, self.gamma, 100, rows + sum(accepted), accepted, host_s=seconds))

    @rule(rows=counts, gamma=st.integers(0, 20), accepted=st.lists(counts, max_size=8), seconds=odd_seconds)
    def observe_something_odd(self, rows, gamma, accepted, seconds):
        for controller in self.both():
            controller.observe(StepStats(rows, gamma, 0, 0, accepted, verify_s=seconds))

    @rule()
    def change_draft(self):
        for controller in self.both():
            controller.draft_changed()

    @rule(ready=st.booleans())
    def set_ready(self, ready):
        for controller in self.both():
            controller.draft_ready = ready

    @rule()
    def reload(self):
        self.copy = self.new()
        self.copy.load_state_dict(json.loads(json.dumps(self.controller.state_dict(), allow_nan=False)))

    @precondition(lambda self: self.copy is not None)
    @rule()
    def compare_schedules(self):
        assert self.copy.schedule(20, 300) == self.controller.schedule(20, 300)

    @invariant()
    def within_bounds(self):
        assert 0 <= self.gamma <= 5
        if not self.controller.draft_ready:
            assert self.controller.choose(4, 100) == 0


ControllerMachine.TestCase.settings = settings(
    deadline=None, max_examples=30, stateful_step_count=25, derandomize=True
)
TestControllerMachine = ControllerMachine.TestCase
