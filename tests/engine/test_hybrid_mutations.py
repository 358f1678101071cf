"""The tests of hybrids notice a state that is not its row's: each mutation makes what they assert fail."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter
from spec_rollout.engine import masks, recurrences, recurrent, rollout
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.engine.masks import causal_mask
from spec_rollout.engine.recurrent import RecurrentPass, RecurrentStates
from spec_rollout.engine.scheduler import Scheduler
from spec_rollout.engine.seats import Seats
from spec_rollout.engine.target import Target
from spec_rollout.records import SamplingParams, UnsupportedModelError
from tests.engine.test_mutations import wrap
from tests.tiny import PROMPTS, VOCAB, Scripted, assert_same, make_policy, policy, reference, unprobed

PARAMS = SamplingParams(max_new_tokens=40)
LIMITS = [8, 40, 5, 12, 9, 12, 20]
"""The last prompt is that of the first two, and enters when the second has moved on."""


@cache
def drawn(name: str):
    return reference(policy(name), PROMPTS, PARAMS, max_new_tokens=LIMITS)


def check(name: str) -> None:
    """Ragged siblings and strangers in three slots, by a drafter that is right two times in three."""
    guesses = [
        replace(c, token_ids=[(t + (i % 3 == 0)) % VOCAB for i, t in enumerate(c.token_ids)]) for c in drawn(name)
    ]
    engine = RolloutEngine(
        policy(name), SpecConfig(max_slots=3), drafter=OracleDrafter(guesses), controller=Scripted(2, 0, 5, 1)
    )
    got = engine.generate(PROMPTS, PARAMS, max_new_tokens=LIMITS)
    assert_same(got, drawn(name), 1e-3)
    assert 1 < engine.stats.mean_acceptance_length < 3


def rejected_guesses_advance_the_state(patch):
    def commit(honest, self, tokens):
        honest(self, torch.full_like(tokens, max((p.convolved.shape[-1] for p in self.pending.values()), default=0)))

    def last(honest, convolved, tokens, size):
        return honest(convolved, tokens.clamp(max=convolved.shape[-1] - size), size)

    wrap(patch, RecurrentStates, "commit", commit)
    wrap(patch, recurrent, "_last", last)


def nothing_is_committed(patch):
    wrap(patch, SlotCache, "commit", lambda honest, self, tokens: None)


def one_token_less_is_committed(patch):
    wrap(patch, SlotCache, "commit", lambda honest, self, tokens: honest(self, tokens - 1))


def convolution_off_by_one(patch):
    wrap(
        patch,
        recurrent,
        "_last",
        lambda honest, convolved, tokens, size: honest(convolved, (tokens - 1).clamp(min=0), size),
    )


def convolution_forgets_the_tokens_before(patch):
    wrap(patch, RecurrentPass, "convolve", lambda honest, *args: honest(*args).clone().index_fill_(2, ZERO, 0))


def siblings_without_a_state(patch):
    def copy(honest, self, source, target, move=False):
        if move:
            return honest(self, source, target, move)
        states, self.cache.states = self.cache.states, RecurrentStates()
        honest(self, source, target)
        self.cache.states = states

    wrap(patch, Seats, "copy", copy)


def moved_rows_without_their_state(patch):
    def copy(honest, self, source, target, move=False):
        if not move:
            return honest(self, source, target)
        states, self.cache.states = self.cache.states, RecurrentStates()
        honest(self, source, target, move)
        self.cache.states = states

    wrap(patch, Seats, "copy", copy)


def siblings_copy_a_row_that_moved_on(patch):
    patch.setattr(rollout, "Scheduler", lambda requests, slots, keeps_prompts: Scheduler(requests, slots))


def stale_after_a_step_without_guesses(patch):
    def recur(honest, self, advance):
        key = self.key
        before = self.states.states[key].clone() if self.width == 1 and key in self.states.states else None
        result = honest(self, advance)
        if before is not None and self.lengths is None:
            self.states.states[key] = before
        return result

    wrap(patch, RecurrentPass, "recur", recur)


def padding_read_as_tokens(patch):
    def init(honest, self, states, rows, width, lengths):
        honest(self, states, rows, width, None if lengths is None else torch.full_like(lengths, width))

    wrap(patch, RecurrentPass, "__init__", init)


def new_rows_in_old_states(patch):
    wrap(patch, SlotCache, "clear", lambda honest, self, slots: None)


def hidden_tokens_decay_the_state(patch):
    wrap(patch, recurrences, "_time_steps", lambda honest, dt, valid, **options: {"dt": dt})


ZERO = torch.tensor([0])
MUTATIONS = [
    rejected_guesses_advance_the_state,
    nothing_is_committed,
    one_token_less_is_committed,
    convolution_off_by_one,
    convolution_forgets_the_tokens_before,
    siblings_without_a_state,
    moved_rows_without_their_state,
    siblings_copy_a_row_that_moved_on,
    stale_after_a_step_without_guesses,
    padding_read_as_tokens,
    new_rows_in_old_states,
]
NAMES = ("qwen3_5_text", "lfm2", "bamba")


def noticed(name, mutation, monkeypatch) -> None:
    drawn(name)
    # the probe must not come before the tokens
    monkeypatch.setattr(Target, "_probe", unprobed)
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        check(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_as_it_is_passes(name):
    check(name)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_mutation_is_noticed(name, mutation, monkeypatch):
    if name == "lfm2" and mutation is stale_after_a_step_without_guesses:
        pytest.skip("it has no recurrence")
    noticed(name, mutation, monkeypatch)


def states_not_copied(patch):
    wrap(patch, RecurrentStates, "copy", lambda honest, self, source, target: None)


@pytest.mark.parametrize(
    "mutation",
    [*MUTATIONS[:5], stale_after_a_step_without_guesses, padding_read_as_tokens, states_not_copied],
    ids=lambda mutation: mutation.__name__,
)
def test_the_probe_comes_before_the_tokens(mutation, monkeypatch):
    mutation(monkeypatch)
    with pytest.raises(UnsupportedModelError, match="BambaForCausalLM does not decode ragged rows"):
        check("bamba")


@pytest.mark.parametrize("name", ["bamba", "nemotron_h"])
def test_time_steps_of_hidden_tokens(name, monkeypatch):
    noticed(name, hidden_tokens_decay_the_state, monkeypatch)


def test_chunks_of_attention(monkeypatch):
    """Chunks longer than the probe are noticed there as well."""

    def ignored(patch):
        patch.setattr(masks, "chunked_mask", lambda positions, extent, size: causal_mask(positions, extent))

    with monkeypatch.context() as patch:
        noticed("llama4_text", ignored, patch)
    ignored(monkeypatch)
    engine = RolloutEngine(make_policy("llama4_text", attention_chunk_size=60))
    with pytest.raises(UnsupportedModelError, match="does not decode ragged rows"):
        engine.generate(PROMPTS, PARAMS)
