"""Memory follows the tokens that are there, within a bound, and what gives way is the same tokens later."""

from dataclasses import replace

import pytest
import torch

import tests.tiny
from spec_rollout.config import SpecConfig
from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.references import OracleDrafter
from spec_rollout.engine import prefill, room
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.kv_cache import SlotWindow
from spec_rollout.engine.room import GIB, Room
from spec_rollout.engine.rows import Parked, Rows
from spec_rollout.engine.seats import Seats
from spec_rollout.engine.target import Target
from spec_rollout.records import CacheBoundError, SamplingParams
from tests.tiny import PROMPTS, VOCAB, Scripted, assert_same, policy, reference, unprobed

PARAMS = SamplingParams(max_new_tokens=70, temperature=0.9, repetition_penalty=1.1)
GAMMAS = (3, 0, 7, 2)


@pytest.fixture(scope="module")
def drawn():
    return reference(policy("llama"), PROMPTS, PARAMS)


def bounded(model, rows: float, tokens: int, drafter=None, **config) -> RolloutEngine:
    """An engine whose slots may take what `rows` of `tokens` tokens do."""
    engine = RolloutEngine(model, SpecConfig(**config), drafter=drafter, controller=drafter and Scripted(*GAMMAS))
    with engine.target.rollout():
        token, slot = engine.target.cache_bytes
    slot += drafter.slot_bytes(tokens) if drafter else 0
    engine.config.max_cache_gib = rows * (tokens * (token + Rows.token_bytes) + slot) / GIB
    return engine


def half_right(expected):
    drafter = OracleDrafter(expected)
    honest = drafter.propose

    def propose(rows, gamma, *rest):
        return honest(rows, gamma, *rest).where(rows.progress()[:, None] % 3 > 0, torch.tensor(5))

    drafter.propose = propose
    return drafter


@pytest.mark.parametrize("path", ["lean", "transformers"])
@pytest.mark.parametrize("rows", [1, 2, 4.5])
def test_rows_that_give_way_draw_the_same(drawn, rows, path, monkeypatch):
    if path == "transformers":
        monkeypatch.setattr("spec_rollout.engine.lean.choice.family_of", lambda model: None)
    engine = bounded(policy("llama"), rows, 96, half_right(drawn))
    got = engine.generate(PROMPTS, PARAMS)
    assert engine.target.path == path
    assert_same(got, drawn)
    assert engine.stats.preemptions > 0 and engine.stats.mean_acceptance_length > 1.3
    assert engine.stats.cache_bytes <= engine.config.max_cache_gib * GIB
    assert max(step.rows for step in engine.stats.steps) > rows
    assert [c.num_drafted > 0 for c in got] == [True] * len(PROMPTS)


def test_with_a_head(drawn):
    drafter = EagleDrafter(
        EagleHead(HeadConfig.for_target(policy("llama").config)).eval(), PolicyView(policy("llama"))
    )
    drafter.ready = True
    engine = bounded(policy("llama"), 2, 96, drafter)
    assert_same(engine.generate(PROMPTS, PARAMS), drawn)
    assert engine.stats.preemptions > 0 and engine.stats.drafter_failures == 0 < engine.stats.drafted


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2"])
def test_recurrent_states_are_read_again(name):
    params = SamplingParams(max_new_tokens=40)
    expected = reference(policy(name), PROMPTS, params)
    engine = bounded(policy(name), 2, 64, half_right(expected))
    assert_same(engine.generate(PROMPTS, params), expected, 1e-3)
    assert engine.stats.preemptions > 0 and engine.stats.mean_acceptance_length > 1.3


def shorter(parked: Parked) -> Parked:
    counts = parked.counts.clone()
    counts[0] -= 1
    return Parked(parked.size - 1, parked.tokens[:-1], parked.logprobs[:-1], counts)


def test_a_row_resumed_at_an_earlier_token_draws_it_again(drawn, monkeypatch):
    """The noise belongs to the place, so even that would be the same completion."""
    honest = Rows.park
    monkeypatch.setattr(Rows, "park", lambda self, slot: shorter(honest(self, slot)))
    engine = bounded(policy("llama"), 2, 96)
    assert_same(engine.generate(PROMPTS, PARAMS), drawn)
    assert sum(step.emitted for step in engine.stats.steps) == 70 * len(PROMPTS) + engine.stats.preemptions


def cache_one_token_short(patch):
    honest = prefill.passes
    longest = max(map(len, PROMPTS))

    def passes(first, done, lengths):
        return honest(first, done, lengths - (lengths > longest))

    patch.setattr(prefill, "passes", passes)


def a_row_goes_on_without_its_last_token(patch):
    honest = Rows.park

    def park(self, slot):
        found = honest(self, slot)
        return replace(found, size=found.size - 1, tokens=found.tokens[:-1], logprobs=found.logprobs[:-1])

    patch.setattr(Rows, "park", park)


def a_region_given_to_two_rows(patch):
    """The row that moves writes where the one that left was, and its keys and values stay behind."""
    honest = Seats.copy
    patch.setattr(Seats, "copy", lambda self, s, t, move=False: honest(self, t if move else s, t, move))


def slots_overlap(patch):
    """The last entries of a slot are the first of the next."""
    honest = SlotWindow._flat

    def places(self, heads):
        found = honest(self, heads)
        return found - found // self.size[1]

    patch.setattr(SlotWindow, "_flat", places)


MUTATIONS = [
    cache_one_token_short,
    a_row_goes_on_without_its_last_token,
    a_region_given_to_two_rows,
    slots_overlap,
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_mutation_is_noticed(mutation, drawn, monkeypatch):
    monkeypatch.setattr(Target, "_probe", unprobed)
    engine = bounded(policy("llama"), 2, 96)
    mutation(monkeypatch)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        assert_same(engine.generate(PROMPTS, PARAMS), drawn)


def test_a_prompt_that_cannot_fit_is_refused_before_anything_runs():
    engine = bounded(policy("llama"), 1, 64)
    passes = []
    engine.progress = lambda *_: passes.append(1)
    with pytest.raises(CacheBoundError, match=r"Prompt 1 .* 90 tokens, and max_cache_gib=.* holds 56 of .*: raise"):
        engine.generate([[1], [2] * 90], SamplingParams(max_new_tokens=4))
    with pytest.raises(CacheBoundError, match=r"\([0-9]+ bytes\) holds 0 of"):
        bounded(policy("llama"), 1, 8).generate([[1, 2]], SamplingParams(max_new_tokens=4))
    assert not passes


def test_a_row_that_outgrows_the_bound_says_so_and_can_be_tried_again(drawn):
    engine = bounded(policy("llama"), 1, 64)
    with pytest.raises(CacheBoundError, match=r"Prompt 0 .*max_cache_gib"):
        engine.generate(PROMPTS, PARAMS)
    assert engine.cache.keys == []
    engine.config.max_cache_gib = None
    assert_same(engine.generate(PROMPTS, PARAMS), drawn)


def test_the_bound_is_half_of_what_is_free(monkeypatch, caplog):
    monkeypatch.setattr("spec_rollout.engine.engine.free_memory", lambda device: 3 * GIB)
    engine = RolloutEngine(policy("llama"))
    with caplog.at_level("INFO"):
        engine.generate([[1, 2]], SamplingParams(max_new_tokens=2))
    assert engine.bound == 1.5 * GIB and "at most 1.5 GiB" in caplog.text
    monkeypatch.setattr("spec_rollout.engine.engine.free_memory", lambda device: 1)
    assert engine.bound == 1.5 * GIB  # found once
    assert RolloutEngine(policy("llama"), SpecConfig(max_cache_gib=0.25)).bound == GIB // 4


def test_free_memory_of_a_container(tmp_path):
    assert 0 < room.free_memory(torch.device("cpu")) < 2**50 and room.free_memory(torch.device("meta")) is None
    assert room._left_in_group(str(tmp_path)) == []
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert room._left_in_group(str(tmp_path)) == [600]
    (tmp_path / "memory.max").write_text("max\n")
    assert room._left_in_group(str(tmp_path)) == []


def test_slots_grow_by_an_eighth_within_the_bound():
    free = Room(None, 10, 5)
    assert free.capacity(4, 100, 1000) == 128 and free.capacity(4, 800, 1000) == 928
    assert free.capacity(4, 800, 810) == 832 and free.bytes(4, 100) == 4020
    tight = Room(4 * (5 + 10 * 864), 10, 5)
    assert tight.capacity(4, 800, 1000) == 864 and tight.capacity(3, 800, 1000) == 928
    assert tight.holds(4, 864) and not tight.holds(4, 865)


def test_a_batch_that_drains_leaves_its_room():
    """One long row among short ones: at the end there is one slot, and never more than what rows reached."""
    limits = [400, *[20] * 15]
    engine, sizes = RolloutEngine(policy("gpt2", max_position_embeddings=512)), []
    engine.progress = lambda *_: sizes.append(engine.cache.keys[0].shape[::2] if engine.cache.keys else None)
    engine.generate([[i + 1] for i in range(16)], SamplingParams(max_new_tokens=32768 // 80), max_new_tokens=limits)
    assert sizes[0] == (16, 32) and sizes[-2][0] == 1
    assert all(capacity <= 32 + 9 / 8 * step + 32 for step, (_, capacity) in enumerate(sizes))
    assert VOCAB and engine.cache.keys == []


@pytest.mark.parametrize("name", ["llama", "qwen3_5_text"])
def test_a_long_row_that_has_left_is_in_nobodys_way(name):
    """Its slot is as long as all others were to become: without it more rows have room, in shorter slots."""
    model, prompts = policy(name), [[1] * 75, *[[i + 2] for i in range(8)]]
    expected = reference(model, prompts, SamplingParams(max_new_tokens=6))
    for drafter in (None, half_right(expected)):
        engine = bounded(model, 1.5, 96, drafter, max_slots=2)
        assert_same(engine.generate(prompts, SamplingParams(max_new_tokens=6)), expected, 1e-3)
        assert [engine.stats.steps[i].rows for i in (0, -1)] == [1, 2]
        assert engine.stats.cache_bytes <= engine.config.max_cache_gib * GIB


def test_the_head_keeps_what_it_has_of_rows_that_are_still_read():
    model = policy("llama")
    drafter = EagleDrafter(EagleHead(HeadConfig.for_target(model.config)).eval(), PolicyView(model))
    drafter.ready = True
    rows = Rows(4, 0, VOCAB, tests.tiny.DEVICE)
    drafter.begin(rows)
    for slots, capacity, kept in ((2, 32, 0), (3, 64, 2)):
        rows.resize(slots, capacity, kept)
        drafter.resize(rows, kept)
        rows.count = 1  # the second is being read
        assert (drafter.window.kept[1, :32] == (5 if kept else 0)).all()
        drafter.window.kept[1] = 5
