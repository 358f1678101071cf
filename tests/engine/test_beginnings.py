"""Prompts that begin alike are read once, and whatever is taken from whomever, the tokens are the same."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_rollout.config import SpecConfig
from spec_rollout.engine import beginnings
from spec_rollout.engine.beginnings import Beginning, Beginnings
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.prefixes import Sequences, common, packed
from spec_rollout.records import SamplingParams
from tests.engine.conversations import keeping
from tests.engine.test_room import bounded
from tests.tiny import assert_same, policy, reference

PARAMS = SamplingParams(max_new_tokens=10)
SYSTEM, SHOTS = [*range(20, 44)], ([1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1])
ALIKE = [
    [*SYSTEM, *SHOTS[0], 9],
    [*SYSTEM, *SHOTS[0], 10, 11],
    [*SYSTEM, *SHOTS[1], 9],
    [*SYSTEM, *SHOTS[0], 9],
    [*SYSTEM, 12],
    [*SYSTEM, *SHOTS[1], 10],
    [60, 61, 62],
]


@pytest.fixture(autouse=True)
def short_beginnings(monkeypatch):
    monkeypatch.setattr(beginnings, "LEAST", 2)
    monkeypatch.setattr(beginnings, "LEAST_WAITED_FOR", 6)


@cache
def drawn(name: str):
    return reference(policy(name), ALIKE, PARAMS)


@pytest.mark.parametrize("slots", [2, 64])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "lfm2"])
def test_what_prompts_have_in_common_is_read_once(name, slots):
    engine = RolloutEngine(policy(name), SpecConfig(max_slots=slots, num_speculative_tokens=0))
    assert_same(engine.generate(ALIKE, PARAMS), drawn(name), 1e-3)
    whole = sum(len(prompt) - 1 for prompt in ALIKE)
    assert engine.stats.prefilled_tokens + engine.stats.reused_tokens == whole
    if name == "lfm2":  # a state cannot be cut: the sibling alone is a copy, where it enters with its like
        assert engine.stats.reused_tokens == (0 if slots == 2 else len(ALIKE[3]) - 1)
    elif slots == 64:
        parts = len(SYSTEM) + sum(map(len, SHOTS)) + len(ALIKE[-1])
        assert parts <= engine.stats.prefilled_tokens <= parts + 2 * len(ALIKE)


def test_nothing_of_little_use_is_waited_for_or_copied(monkeypatch):
    monkeypatch.setattr(beginnings, "LEAST", 16)
    monkeypatch.setattr(beginnings, "LEAST_WAITED_FOR", 128)
    engine = RolloutEngine(policy("llama"), SpecConfig(num_speculative_tokens=0))
    assert_same(engine.generate(ALIKE, PARAMS), drawn("llama"))
    assert engine.stats.reused_tokens == len(ALIKE[3]) - 1  # the sibling's
    assert len(engine.stats.steps) == PARAMS.max_new_tokens  # none entered later than the others


def test_within_a_bound():
    engine = bounded(policy("llama"), 2.5, 64)
    assert_same(engine.generate(ALIKE, PARAMS), drawn("llama"))
    assert engine.stats.reused_tokens > len(ALIKE[3]) and max(s.rows for s in engine.stats.steps) < len(ALIKE)


def a_token_too_much(patch):
    honest = Sequences.most_alike

    def most_alike(self, tokens):
        index, size = honest(self, tokens)
        return index, size + 2 if size else size

    patch.setattr(Sequences, "most_alike", most_alike)


def of_another_row(patch):
    honest = Beginnings.find

    def find(self, request):
        found = honest(self, request)
        others = [index for index in self._packed if index != request.index and index not in self._entering]
        return Beginning(found.tokens, others[-1]) if found and found.tokens and others else found

    patch.setattr(Beginnings, "find", find)


@pytest.mark.parametrize("mutation", [a_token_too_much, of_another_row])
def test_mutation_is_noticed(mutation, monkeypatch):
    drawn("llama")
    mutation(monkeypatch)
    with pytest.raises((AssertionError, IndexError, RuntimeError, KeyError)):
        test_what_prompts_have_in_common_is_read_once("llama", 2)


FEW = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(known=st.lists(FEW, max_size=12), tokens=FEW)
def test_sequences_find_what_a_search_of_all_finds(known, tokens):
    found = Sequences()
    for i, each in enumerate(known):
        found.add(packed(each), i)
    for i in range(0, len(known), 3):
        found.remove(packed(known[i]), i)
    left = {i: each for i, each in enumerate(known) if i % 3}
    alike = {
        i: sum(each[: n + 1] == tokens[: n + 1] for n in range(min(map(len, (each, tokens)))))
        for i, each in left.items()
    }
    item, size = found.most_alike(packed(tokens))
    assert size == max(alike.values(), default=0) and (item is None or alike[item] == size)
    whole = {i: size for i, size in alike.items() if size == len(left[i])}
    item, size = found.longest_within(packed(tokens))
    assert size == max(whole.values(), default=0) and (item is None or whole[item] == size)
    assert common(packed([1, 2, 3]), packed([1, 2, 70000])) == 2


TURN = st.tuples(st.integers(0, 7), st.integers(0, 30), st.lists(st.integers(0, 3), min_size=1, max_size=4))
"""A conversation of any turn before, where it is cut, and what is said then."""


@pytest.mark.parametrize("name", ["llama", "mistral", "lfm2"])
@settings(max_examples=12, deadline=None)
@given(
    turns=st.lists(st.lists(TURN, min_size=1, max_size=5), min_size=2, max_size=4),
    slots=st.integers(1, 4),
    rows=st.sampled_from([None, 1.6, 3.0]),
    limit=st.integers(1, 6),
)
def test_histories_of_turns(name, turns, slots, rows, limit):
    if rows is None:
        engine = keeping(policy(name), max_slots=slots, num_speculative_tokens=0)
    else:
        engine = bounded(policy(name), rows, 64, max_slots=slots)
        engine.keep_rows()
    other = RolloutEngine(policy(name), SpecConfig(num_speculative_tokens=0))
    params, said = SamplingParams(max_new_tokens=limit), [[1]]
    for seed, turn in enumerate(turns):
        prompts = [[*said[which % len(said)][:cut], *more] for which, cut, more in turn]
        got = engine.generate(prompts, params, seed=(seed,))
        assert_same(got, other.generate(prompts, params, seed=(seed,)), 1e-3)
        assert rows is None or engine.stats.cache_bytes <= engine.bound
        said += [[*prompt, *c.token_ids] for prompt, c in zip(prompts, got, strict=True)]
        said = [each for each in said if len(each) < 40]
