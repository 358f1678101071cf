"""The slot cache: after any step, every row's keys and values are those of a fresh prefill."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from transformers import DynamicCache

from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter, RandomDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.engine.masks import causal_mask
from spec_rollout.engine.requests import make_requests
from spec_rollout.engine.support import cache_argument
from spec_rollout.records import SamplingParams
from tests.engine.watched import Watched
from tests.tiny import PROMPTS, VOCAB, Scripted, policy

pytestmark = pytest.mark.any_device


class Checked(Watched):
    """A rollout that compares every active row with a fresh prefill whenever the rows have changed."""

    checks = 0

    def check(self) -> None:
        assert self.rows.lengths[: self.rows.count].tolist() == self.rows.length[: self.rows.count].tolist()
        for slot, request in enumerate(self.scheduler.active[: self.rows.count]):
            length, start = int(self.rows.length[slot]), len(request.prompt)
            tokens = self.rows.tokens[slot, : length + 1].tolist()
            assert tokens[:start] == list(request.prompt) and int(self.rows.start[slot]) == start
            assert int(self.rows.request[slot]) == request.index
            assert self.rows.key[slot].tolist() == list(request.key)
            if length == 0:
                continue
            fresh = DynamicCache()  # without a config it keeps every entry, also of sliding layers
            self.target.model(
                input_ids=torch.tensor([tokens[:length]]), use_cache=True, **{cache_argument(self.target.model): fresh}
            )
            for layer, (keys, values) in enumerate(zip(self.cache.keys, self.cache.values, strict=True)):
                for mine, theirs in ((keys, fresh.layers[layer].keys), (values, fresh.layers[layer].values)):
                    torch.testing.assert_close(mine[slot, :, :length], theirs[0], atol=2e-5, rtol=1e-4)
            Checked.checks += 1


@pytest.mark.parametrize("slots", [2, 3, 64])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "mistral"])
def test_every_step_equals_a_fresh_prefill(name, slots, monkeypatch):
    Checked.checks = Checked.moves = 0
    monkeypatch.setattr("spec_rollout.engine.engine.Rollout", Checked)
    model, params = policy(name), SamplingParams(max_new_tokens=12)
    limits = [9, 4, 12, 12, 3, 12, 6]
    plain = RolloutEngine(model, SpecConfig(num_speculative_tokens=0)).generate(PROMPTS, params)
    half_right = OracleDrafter(plain)
    honest = half_right.propose
    half_right.propose = lambda rows, gamma, *rest: honest(rows, gamma, *rest).where(
        rows.progress()[:, None] % 3 > 0, torch.tensor(5)
    )
    engine = RolloutEngine(model, SpecConfig(max_slots=slots), drafter=half_right, controller=Scripted(3, 0, 5, 1))
    got = engine.generate(PROMPTS, params, max_new_tokens=limits)
    assert [c.token_ids for c in got] == [c.token_ids[:n] for c, n in zip(plain, limits, strict=True)]
    assert engine.stats.mean_acceptance_length > 1.3
    assert Checked.checks > 30 and Checked.moves > 0


def test_verbs_one_by_one():
    """The verbs of the loop, driven by hand: rejected guesses are rolled back by lowering a number."""
    engine = RolloutEngine(policy("llama"), SpecConfig(num_speculative_tokens=4), drafter=RandomDrafter())
    params = SamplingParams(max_new_tokens=8, temperature=0)
    requests = make_requests([[1, 2, 3], [4]], params, (0,), None, VOCAB, None)
    with engine.target.rollout():
        rollout = engine.start(requests, params)
        rollout.admit()
        assert rollout.rows.length.tolist() == [2, 0] and rollout.longest == 2
        assert rollout.noise(5) is None
        guesses = rollout.propose(4, None)
        logits, hidden = rollout.forward(guesses)
        assert logits.shape == (2, 5, VOCAB) and len(hidden) == 3 and hidden[0].shape == (2, 5, 32)
        samples, verdict = rollout.sample_and_verify(logits, None, guesses)
        rollout.commit(samples, verdict, hidden)
        assert rollout.rows.length.tolist() == [2 + int(verdict.emitted[0]), int(verdict.emitted[1])]
        step = rollout.finish_step(4)
        assert step.rows == 2 and step.gamma == 4 and step.emitted == int(verdict.emitted.sum())
        assert step.context == max(rollout.rows.lengths)
        assert not rollout.done


class CacheMachine(RuleBasedStateMachine):
    """Writes and copies against a naive model: one dictionary of entries per slot."""

    SLOTS, CAPACITY, HEADS, DIM, LAYERS = 4, 12, 2, 3, 2

    @initialize()
    def start(self):
        self.cache = SlotCache()
        self.cache.allocate(self.SLOTS, self.CAPACITY)
        self.naive = [[{} for _ in range(self.SLOTS)] for _ in range(self.LAYERS)]
        self.counter = 0

    @rule(data=st.data(), width=st.integers(1, 4))
    def write(self, data, width):
        start = data.draw(st.integers(0, self.SLOTS - 1))
        stop = data.draw(st.integers(start + 1, self.SLOTS))
        first = [data.draw(st.integers(0, self.CAPACITY - width)) for _ in range(start, stop)]
        extent = data.draw(st.integers(max(first) + width, self.CAPACITY))
        positions = torch.tensor(first)[:, None] + torch.arange(width)
        window = self.cache.window(start, positions, extent)
        for layer in range(self.LAYERS):
            shape = (stop - start, self.HEADS, width, self.DIM)
            states = torch.arange(shape[0] * self.HEADS * width * self.DIM).view(shape).float() + self.counter
            self.counter += 1000
            keys, values = window.update(states, -states, layer)
            assert keys.shape == values.shape == (stop - start, self.HEADS, extent, self.DIM)
            assert torch.equal(keys, -values)
            for row, slot in enumerate(range(start, stop)):
                for place in range(width):
                    self.naive[layer][slot][first[row] + place] = states[row, :, place]
                for place, entry in self.naive[layer][slot].items():
                    assert place >= extent or torch.equal(keys[row, :, place], entry)

    @rule(data=st.data(), extent=st.integers(0, 12))
    def copy(self, data, extent):
        slots = data.draw(st.permutations(range(self.SLOTS)))
        size = data.draw(st.integers(1, self.SLOTS // 2))
        source, target = slots[:size], slots[-size:]  # apart from each other, as moves and siblings are
        self.cache.copy(torch.tensor(source), torch.tensor(target), extent)
        for layer in self.naive:
            for s, t in zip(source, target, strict=True):
                kept = {place: entry for place, entry in layer[t].items() if place >= extent}
                layer[t] = kept | {place: entry for place, entry in layer[s].items() if place < extent}
                for place in range(extent):  # what the source has not written is not to be relied on
                    if place not in layer[s]:
                        layer[t].pop(place, None)

    @invariant()
    def entries_are_as_written(self):
        for keys, layer in zip(self.cache.keys, self.naive, strict=False):
            for slot, entries in enumerate(layer):
                for place, entry in entries.items():
                    assert torch.equal(keys[slot, :, place], entry)


CacheMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=15, deadline=None, derandomize=True)
TestCache = CacheMachine.TestCase


def test_one_slot_copied_to_many():
    cache = SlotCache()
    cache.allocate(4, 8)
    cache.window(0, torch.arange(3)[None], 3).update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    cache.copy(torch.tensor([0, 0]), torch.tensor([3, 1]), 2)
    assert cache.keys[0][:, 0, :, 0].sum(1).tolist() == [3, 2, 0, 2]


@pytest.mark.parametrize(("slots", "capacity", "kept"), [(4, 8, 4), (2, 6, 2), (6, 3, 1), (1, 16, 0)])
def test_resized_slots_keep_what_they_held(slots, capacity, kept):
    cache = SlotCache()
    cache.allocate(4, 8)
    states = torch.arange(4 * 8.0).add(1).view(4, 1, 8, 1)
    cache.window(0, torch.arange(8).expand(4, 8), 8).update(states, -states, 0)
    before = cache.keys[0]
    cache.resize(slots, capacity, kept)
    assert (cache.slots, cache.capacity) == cache.keys[0].shape[::2] == (slots, capacity)
    assert torch.equal(cache.keys[0], -cache.values[0])
    shared = min(capacity, 8)
    assert torch.equal(cache.keys[0][:kept, :, :shared], before[:kept, :, :shared])
    assert not cache.keys[0][kept:].any() and not cache.keys[0][:, :, shared:].any()  # NaN would count even if masked


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_causal_mask(window):
    positions = torch.tensor([[2, 3, 4], [0, 1, 2], [7, 8, 9]])
    mask = causal_mask(positions, 10, window)
    assert mask.shape == (3, 1, 3, 10) and mask.dtype == torch.bool
    for row in range(3):
        for place in range(3):
            query = int(positions[row, place])
            seen = [k for k in range(10) if k <= query and (window is None or k > query - window)]
            assert mask[row, 0, place].nonzero().flatten().tolist() == seen
