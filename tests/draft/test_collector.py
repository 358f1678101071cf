"""What is learned from: a sample of the places of all rollouts, each as likely as the other, within its budget."""

import gc

import numpy as np
import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft import collector, spans
from spec_rollout.draft.collector import Collector
from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.features import FeatureBuffer
from spec_rollout.draft.ngram_drafter import NgramDrafter
from spec_rollout.draft.ngrams import History
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.self_drafter import SelfDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.room import GIB
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.transfers import on_both_sides
from spec_rollout.gamma import FixedGamma
from spec_rollout.records import Request, SamplingParams
from tests.engine.test_memory import Memory
from tests.tiny import PROMPTS, Scripted, make_policy, policy

PREFILL = 64


def hidden_of(index: np.ndarray, place: np.ndarray) -> torch.Tensor:
    """[N, T, 2]: features that tell whose they are."""
    return torch.from_numpy(np.stack(np.broadcast_arrays(index, place), -1).astype(np.float32))


def rollouts(buffer: FeatureBuffer, sizes: list[tuple[int, int]], slots: int, step: int, seed: int = 0) -> None:
    """Rows of (prompt, completion) tokens as an engine would run them, `step` tokens at a time but for a few guesses
    that fail; those that end make room for others."""
    chance = np.random.default_rng(seed)
    waiting = [Request(i, [i % 7] * prompt, (i, 0), new) for i, (prompt, new) in enumerate(sizes)]
    rows, own = Rows(slots, 0, 50, torch.device("cpu")), Collector((0,), torch.empty(2), buffer)
    own.begin(rows)
    capacity = max(map(sum, sizes)) + step + 2
    rows.resize(slots, capacity, 0)
    own.resize(rows, 0)
    active: list[Request] = []
    while waiting or active:
        first = len(active)
        active += [waiting.pop(0) for _ in range(min(slots - first, len(waiting)))]
        rows.count = len(active)
        if first < len(active):
            rows.fill(first, active[first:])
            here = slice(first, len(active))
            index, longest = rows.indices[here, None], int(rows.lengths[here].max())
            for start in range(0, longest, PREFILL):
                done = np.minimum(rows.lengths[here], start)
                hidden = hidden_of(index, done[:, None] + np.arange(min(PREFILL, longest - start)))
                own.read(rows, (first, len(active)), done, [hidden, hidden])
            own.admit(rows, (first, len(active)))
        count, start = rows.count, rows.lengths[: rows.count].copy()
        hidden = hidden_of(rows.indices[:count, None], start[:, None] + np.arange(step))
        left = [r.max_new_tokens + len(r.prompt) - 1 for r in active] - start
        rows.lengths[:count] += np.minimum(left, step - chance.integers(0, 3, count).clip(max=step - 1))
        rows.length[:count] = torch.from_numpy(rows.lengths[:count])
        own.observe(rows, (0, count), torch.from_numpy(start), [hidden, hidden])
        ended = [s for s, r in enumerate(active) if rows.lengths[s] == len(r.prompt) + r.max_new_tokens - 1]
        if ended:
            own.finish(rows, on_both_sides(ended, rows.device))
            source = [s for s in range(count - len(ended), count) if s not in ended]
            target = [s for s in ended if s < count - len(ended)]
            if source:
                pair = (on_both_sides(source, rows.device), on_both_sides(target, rows.device))
                rows.copy(*pair)
                own.copy(rows, *pair)
                for s, t in zip(source, target, strict=True):
                    active[t] = active[s]
            del active[count - len(ended) :]
        assert buffer.tokens <= buffer.max_tokens
        kept = sum(len(s.features) for s in buffer.samples) + sum(s.size for s in buffer.open.values())
        assert kept == buffer.tokens
    own.end()


def learned_places(buffer: FeatureBuffer) -> list[tuple[int, int]]:
    """(row, index of a sampled token) that is learned from."""
    found = []
    for sample in buffer.samples:
        row, last = int(sample.features[0, 0]), sample.first + len(sample.features)
        places = torch.arange(sample.first, last)
        assert (sample.features[:, [0, 2]] == row).all() and len(sample.tokens) == len(places) + 1
        assert (sample.features[:, 1] == places).all() and (sample.features[:, 3] == places).all()
        found += [(row, p + 2 - sample.prompt) for p in places[:-1].tolist() if p + 2 >= sample.prompt]
    return found


SIZES = [(5, 30)] * 12 + [(200, 150)] * 4 + [(40, 1200)] * 2 + [(1, 700)] + [(3, 1)] + [(90, 2000)]


@pytest.mark.parametrize("step", [1, 12])
@pytest.mark.parametrize("slots", [3, 40])
def test_with_room_for_all_each_token_is_learned_from_once(step, slots):
    buffer = FeatureBuffer(100_000)
    rollouts(buffer, SIZES, slots, step)
    places = learned_places(buffer)
    assert sorted(places) == [
        (row, t) for row, (prompt, new) in enumerate(SIZES) for t in range(prompt == 1, new) if new > 1 or prompt > 1
    ]
    assert max(len(sample.features) for sample in buffer.samples) == spans.PACK_WIDTH
    first = next(s for s in buffer.samples if s.prompt == 200)
    assert first.first == 199 - spans.CONTEXT  # of the prompt, no more than that


@pytest.fixture
def short_spans(monkeypatch):
    monkeypatch.setattr(spans, "STRIDE", 30)
    for module in (spans, collector):
        monkeypatch.setattr(module, "CONTEXT", 4)


def rates_of(times: int) -> dict[str, float]:
    """How often places are learned from where a third of all has room: in rows of all lengths, early and late."""
    sizes = [(5, 10)] * 24 + [(5, 26)] * 8 + [(5, 60)] * 3 + [(5, 115)] * 2
    sizes = [sizes[i] for i in np.random.default_rng(1).permutation(len(sizes))]
    kept = np.zeros((len(sizes), 115))
    for seed in range(times):
        buffer = FeatureBuffer(sum(map(sum, sizes)) // 3, seed=seed)
        rollouts(buffer, sizes, 12, 7, seed)
        for row, token in learned_places(buffer):
            kept[row, token] += 1
    groups = {"short": (10, 0, 10), "middle": (26, 0, 26), "early": (115, 0, 27), "late": (115, 27, 110)}
    groups |= {"last": (115, 110, 115), "long": (60, 0, 60)}
    rows = {new: [i for i, size in enumerate(sizes) if size[1] == new] for _, new in sizes}
    return {name: kept[rows[new], start:stop].mean() / times for name, (new, start, stop) in groups.items()}


def test_each_place_is_as_likely_as_the_other(short_spans):
    """Lengths may show by a span's share of the budget, a 16th; σ is at most 0.024, of 400 draws."""
    check_rates(rates_of(200))


def check_rates(rates):
    assert all(rate == pytest.approx(np.mean(list(rates.values())), abs=0.07) for rate in rates.values()), rates
    assert rates["short"] == pytest.approx(rates["middle"], abs=0.03) == pytest.approx(1 / 3, abs=0.05)


def first_come(self, row, number, place):
    return honest_start(self, row, number, place) if self.tokens < 0.9 * self.max_tokens else None


def the_last_one_goes(self):
    while self.tokens > self.max_tokens:
        if self.samples:
            self._drop(len(self.samples) - 1)
        else:
            self.drop(next(reversed(self.open)))


def heads_of_rollouts(self, row, number, place):
    return None if number else honest_start(self, row, number, place)


honest_start = FeatureBuffer.start


@pytest.mark.parametrize(
    ("name", "broken"),
    [("start", first_come), ("_make_room", the_last_one_goes), ("start", heads_of_rollouts)],
)
def test_a_sample_that_favours_some_is_noticed(name, broken, short_spans, monkeypatch):
    monkeypatch.setattr(FeatureBuffer, name, broken)
    with pytest.raises(AssertionError):
        check_rates(rates_of(60))


def test_the_sample_is_the_same_whichever_rows_end_first():
    found = set()
    for slots, step in ((1, 7), (4, 16), (21, 3)):
        buffer = FeatureBuffer(1500, seed=5)
        rollouts(buffer, SIZES, slots, step)
        found.add(tuple(sorted(learned_places(buffer))))
    assert len(found) == 1 and 500 < len(found.pop()) < 1500


def test_the_oldest_policy_gives_way_first_and_each_call_draws_anew():
    buffer = FeatureBuffer(1000)
    rollouts(buffer, [(5, 100)] * 6, 3, 5)
    buffer.advance()
    rollouts(buffer, [(5, 100)] * 4, 3, 5)
    assert [s.version for s in buffer.samples].count(1) == 4 and len(buffer.samples) == 9
    rollouts(buffer, [(5, 100)] * 40, 3, 5)
    assert {s.version for s in buffer.samples} == {1}
    assert len({round(s.rank, 9) for s in buffer.samples}) == len(buffer.samples) == 9


@pytest.mark.parametrize("budget", [0, 1, 20])
def test_a_budget_for_less_than_a_row(budget):
    buffer = FeatureBuffer(budget)
    rollouts(buffer, [(5, 100), (2, 10), (3, 4)], 3, 5)
    assert buffer.tokens <= budget and len(buffer.samples) <= 2


PARAMS = SamplingParams(max_new_tokens=90, temperature=0.9)
ENTERING = [PROMPTS[0], *PROMPTS[1:3], PROMPTS[0], *PROMPTS[3:]]
LIMITS = [90, 24, 47, 73, 60, 9, 33, 52]


def eagle(model, buffer, ready=True):
    drafter = EagleDrafter(EagleHead(HeadConfig.for_target(model.config)).eval(), PolicyView(model), buffer)
    drafter.ready = ready
    return drafter


def collect_only(model, buffer):
    return eagle(model, buffer, ready=False)


def ngrams(model, buffer):
    history = History(torch.device("cpu"))
    history.add([(PROMPTS[0], [1, 2, 3, 4, 5, 6])])
    return NgramDrafter(history, eagle(model, buffer).collector)


def quantized(model, buffer):
    return SelfDrafter(RolloutEngine(model).target, eagle(model, buffer).collector)


@pytest.mark.parametrize("rows", [None, 2.2])
@pytest.mark.parametrize("make", [eagle, collect_only, ngrams])
def test_the_features_are_those_of_the_policys_own_pass(make, rows, short_spans, monkeypatch):
    """In spans of rows that enter, move, take over a prompt late, give way and come back; each token once."""
    check_features(make, rows, monkeypatch)


def check_features(make, rows, monkeypatch):
    monkeypatch.setattr(collector, "READ", 20)
    monkeypatch.setattr(Collector, "slot_bytes", lambda self, reads=False: 0)
    model, buffer = policy("llama"), FeatureBuffer(10_000)
    drafter = make(model, buffer)
    options = {}
    if rows:
        engine = RolloutEngine(model)
        with engine.target.rollout():
            token, slot = engine.target.cache_bytes
        options["max_cache_gib"] = rows * (128 * (token + Rows.token_bytes + drafter.token_bytes) + slot) / GIB
    engine = RolloutEngine(
        model, SpecConfig(max_slots=8 if rows else 3, **options), drafter=drafter, controller=Scripted(2, 0, 0, 7, 0)
    )
    drawn = engine.generate(ENTERING, PARAMS, max_new_tokens=LIMITS)
    assert bool(engine.stats.preemptions) == bool(rows) and engine.stats.drafter_failures == 0
    layers, places = HeadConfig.for_target(model.config).aux_layers, []
    known = [[*prompt, *c.token_ids] for prompt, c in zip(ENTERING, drawn, strict=True)]
    for sample in buffer.samples:
        span = slice(sample.first, sample.first + len(sample.tokens))
        (row,) = {i for i, ids in enumerate(known) if ids[span] == sample.tokens.tolist()}
        assert sample.group == hash(tuple(ENTERING[row])) and sample.prompt == len(ENTERING[row])
        with torch.no_grad():
            states = model(torch.tensor([known[row]]), output_hidden_states=True).hidden_states
        whole = torch.cat([*(states[i][0] for i in layers), states[-1][0]], -1)
        torch.testing.assert_close(sample.features, whole[span][:-1], atol=2e-4, rtol=2e-4)
        last = sample.first + len(sample.features) - 1
        places += [(row, p + 2 - sample.prompt) for p in range(sample.first, last) if p + 2 >= sample.prompt]
    assert sorted(places) == [(i, t) for i, p in enumerate(ENTERING) for t in range(len(p) == 1, LIMITS[i])]


def test_a_sibling_without_its_prompt_is_noticed(short_spans, monkeypatch):
    """Broken on purpose: the entries of the prompt are not those that it takes over."""
    honest = Collector.copy

    def copy(self, rows, source, target):
        honest(self, rows, source, target)
        self.window.tail[target.device] = 0

    monkeypatch.setattr(Collector, "copy", copy)
    with pytest.raises(AssertionError):
        check_features(eagle, None, monkeypatch)


@pytest.mark.parametrize("make", [eagle, collect_only, ngrams, quantized])
def test_memory_does_not_follow_the_rows_and_is_given_back(make):
    """Bytes of the windows, of what is learned from, and after the rollout of the latter alone."""
    model = make_policy("llama", max_position_embeddings=2048)
    held = {}
    for new in (40, 560):
        buffer = FeatureBuffer(1200)
        drafter = make(model, buffer)
        own = drafter.collector
        engine = RolloutEngine(model, SpecConfig(max_slots=4), drafter=drafter, controller=FixedGamma(0))
        sizes = []
        engine.progress = lambda *_, own=own, sizes=sizes: sizes.append(
            own.window.ring.nbytes + own.window.tail.nbytes
        )
        engine.generate([[i + 1] * 3 for i in range(4)], SamplingParams(max_new_tokens=8))  # made once
        buffer.clear()
        before = {id(x) for x in tensors()}
        engine.generate([[i + 1] * 3 for i in range(6)], SamplingParams(max_new_tokens=new))
        held[new] = max(sizes)
        assert drafter.slot_bytes * 4 >= max(sizes) > 0
        assert 0 < buffer.tokens <= 1200 and not buffer.open
        kept = {id(t) for s in buffer.samples for t in (s.tokens, s.features)}
        assert sum(s.features.nbytes for s in buffer.samples) <= 1200 * 4 * model.config.hidden_size * 4
        left = [x for x in tensors() if id(x) not in before | kept and x.untyped_storage().nbytes() > 4096]
        assert not [tuple(x.shape) for x in left]
    assert held[40] == held[560]


def tensors() -> list[torch.Tensor]:
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is torch.Tensor]


def test_a_head_that_has_not_learned_keeps_nothing_without_a_buffer():
    model = policy("llama")
    drafter = eagle(model, None, ready=False)
    assert drafter.slot_bytes == drafter.token_bytes == 0
    engine = RolloutEngine(model, SpecConfig(), drafter=drafter, controller=FixedGamma(0))
    with Memory([*model.parameters()]) as memory:
        engine.generate(PROMPTS, SamplingParams(max_new_tokens=9))
    plain = RolloutEngine(model, SpecConfig())
    with Memory([*model.parameters()]) as without:
        plain.generate(PROMPTS, SamplingParams(max_new_tokens=9))
    rows = Rows.token_bytes // 2 * len(PROMPTS) * 64 + 2**15  # the copy of the rows that it is shown
    assert memory.peak <= without.peak + rows and drafter.window.ring is None and not drafter.cache.keys
