"""What is learned from: a sample of the places of all rollouts, each as likely as the other, within its budget."""

import numpy as np
import pytest
import torch

from spec_rollout.draft import collector, spans
from spec_rollout.draft.collector import Collector
from spec_rollout.draft.features import FeatureBuffer
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.transfers import on_both_sides
from spec_rollout.records import Request

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
