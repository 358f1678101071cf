"""The tests of turns notice what does not belong to a row: each mutation makes what they assert fail."""

import pytest

from spec_rollout.engine import beginnings
from spec_rollout.engine.kept_rows import KeptRows
from spec_rollout.engine.kept_slot import KeptSlot
from spec_rollout.engine.target import Target
from tests.engine.conversations import ERROR, Talk, check, drawn, keeping, nudged
from tests.tiny import assert_same, make_policy, reference, unprobed


@pytest.fixture(autouse=True)
def short_beginnings(monkeypatch):
    monkeypatch.setattr(beginnings, "LEAST", 0)


def an_older_version_is_kept(patch):
    patch.setattr(KeptRows, "open", lambda self, state: None)


def two_tokens_too_long(patch):
    """One more than is the same; the last that is the same is left out anyway."""
    honest = KeptRows.find

    def find(self, tokens, whole):
        row, size = honest(self, tokens, whole)
        return row, size + 2

    patch.setattr(KeptRows, "find", find)


def another_rows_prefix(patch):
    honest = KeptRows.find

    def find(self, tokens, whole):
        row, size = honest(self, tokens, whole)
        others = [other for other in self._rows if other.slot.tokens >= size - 1 and other is not row]
        return (others or [row])[0], size

    patch.setattr(KeptRows, "find", find)


def kept_one_token_short(patch):
    honest = KeptRows.add

    def add(self, row):
        for part in (*row.slot.keys, *row.slot.values):
            part[-1] = 0
        honest(self, row)

    patch.setattr(KeptRows, "add", add)


def states_of_another_row(patch):
    honest = KeptSlot.__init__
    last = {}

    def init(self, tokens, keys, values, convolutions, states):
        honest(self, tokens, keys, values, last.get("c", convolutions), last.get("s", states))
        last.update(c=convolutions, s=states)

    patch.setattr(KeptSlot, "__init__", init)


MUTATIONS = [an_older_version_is_kept, two_tokens_too_long, another_rows_prefix, kept_one_token_short]


def fail(name: str) -> None:
    """What the mutations must break: turns, and a turn of another version."""
    check(name)
    talk = Talk(keeping(make_policy(name), num_speculative_tokens=0))
    talk.take()
    nudged(talk.engine.target.model)
    prompts = [list(prompt) for prompt in talk.prompts]
    assert_same(talk.take(), reference(talk.engine.target.model, prompts, talk.params, (1,)), ERROR)


@pytest.mark.parametrize(
    ("name", "mutation"),
    [*((n, m) for n in ("llama", "gemma3_text", "bamba") for m in MUTATIONS), ("qwen3_5_text", states_of_another_row)],
)
def test_mutation_is_noticed(name, mutation, monkeypatch):
    drawn(name)
    monkeypatch.setattr(Target, "_probe", unprobed)
    mutation(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        fail(name)


def test_the_engine_as_it_is_passes():
    fail("llama")
    fail("bamba")
