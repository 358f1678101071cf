"""The tests of this folder notice a broken engine: each mutation makes what they assert fail."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter
from spec_rollout.engine import masks, noise, rollout, verify
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.engine.masks import causal_mask
from spec_rollout.engine.noise import NoiseWindow
from spec_rollout.engine.results import Results
from spec_rollout.engine.rollout import Rollout
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.sampling import Sampler
from spec_rollout.engine.seats import Seats
from spec_rollout.engine.stops import Stops
from spec_rollout.engine.target import Target
from spec_rollout.engine.transfers import on_both_sides
from spec_rollout.engine.verify import Verdict
from spec_rollout.records import SamplingParams
from tests.tiny import PROMPTS, VOCAB, Scripted, assert_same, cut, policy, reference, unprobed

PARAMS = SamplingParams(max_new_tokens=40, temperature=0.8, repetition_penalty=1.2)
NAME = "mistral"


@cache
def drawn():
    return reference(policy(NAME), PROMPTS, PARAMS)


def check() -> None:
    """Ragged siblings and strangers in three slots; first a drafter that is right two times in three, then one that is
    always right, with an EOS inside its guesses."""
    free = drawn()
    eos = (free[3].token_ids[13],)
    ended = cut(free, eos)
    two_thirds = [replace(c, token_ids=[(t + (i % 3 == 0)) % VOCAB for i, t in enumerate(c.token_ids)]) for c in free]
    for expected, eos_token_ids, guesses, gammas in ((free, (), two_thirds, (2, 0, 7, 1)), (ended, eos, free, (3,))):
        drafter, controller = OracleDrafter(guesses), Scripted(*gammas)
        engine = RolloutEngine(policy(NAME), SpecConfig(max_slots=3), drafter=drafter, controller=controller)
        got = engine.generate(PROMPTS, replace(PARAMS, eos_token_ids=eos_token_ids))
        assert_same(got, expected)
        assert engine.stats.mean_acceptance_length > 1
    assert [c.num_steps for c in got] == [-(-len(c.token_ids) // 4) for c in ended]


def wrap(monkeypatch, owner, name, mutation):
    honest = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: mutation(honest, *args, **kwargs))


def position_off_by_one(patch):
    def forward(honest, self, cache, slots, ids, positions, extent, **prefill):
        return honest(self, cache, slots, ids, positions + (0 if prefill else 1), extent, **prefill)

    wrap(patch, Target, "forward", forward)


def stale_cache_after_a_move(patch):
    def copy(honest, self, source, target, move=False):
        if not move:
            return honest(self, source, target)
        src, dst = (on_both_sides(slots, self.rows.device) for slots in (source, target))
        self.rows.copy(src, dst)
        self.sampler.copy(src, dst)

    wrap(patch, Seats, "copy", copy)


def siblings_left_empty(patch):
    wrap(patch, Seats, "copy", lambda honest, self, *slots, move=False: honest(self, *slots, move) if move else None)


def copy_one_entry_short(patch):
    wrap(patch, SlotCache, "copy", lambda honest, self, s, t, extent: honest(self, s, t, extent - 1))


def noise_reused_at_the_next_position(patch):
    wrap(patch, noise, "gumbel", lambda honest, keys, steps, size: honest(keys, steps // 2, size))


def stale_noise_after_a_move(patch):
    wrap(patch, NoiseWindow, "copy", lambda honest, *args: None)


def stale_noise_after_an_admission(patch):
    wrap(patch, NoiseWindow, "admit", lambda honest, *args: None)


def key_not_moved(patch):
    patch.setattr(Rows, "MOVED", tuple(name for name in Rows.MOVED if name != "key"))
    stale_noise_after_a_move(patch)


def unprocessed_logits(patch):
    wrap(patch, Sampler, "process", lambda honest, self, logits, seen: logits.float())


def penalty_ignores_the_guesses(patch):
    def seen_along(honest, self, rows, inputs):
        return self.seen[: rows.count, None].expand(-1, inputs.shape[1], -1)

    wrap(patch, Sampler, "seen_along", seen_along)


def penalty_sees_all_the_guesses(patch):
    def seen_along(honest, self, rows, inputs):
        return honest(self, rows, inputs)[:, -1:].expand(-1, inputs.shape[1], -1)

    wrap(patch, Sampler, "seen_along", seen_along)


def penalty_notes_rejected_guesses(patch):
    def commit(honest, self, rows, samples, emitted):
        honest(self, rows, samples, torch.full_like(emitted, samples.shape[1]))

    wrap(patch, Sampler, "commit", commit)


def judged(patch, mutation):
    patch.setattr(rollout, "verify", lambda *args: mutation(verify.verify(*args), *args))


def missing_bonus_token(patch):
    def mutation(verdict, guesses, samples, remaining, stops):
        emitted = torch.minimum(verdict.accepted.clamp(min=1), verdict.emitted)
        shorter = emitted < verdict.emitted
        return Verdict(verdict.accepted, emitted, verdict.ended.where(~shorter, 0), verdict.full.where(~shorter, 0))

    judged(patch, mutation)


def guesses_taken_unverified(patch):
    def mutation(verdict, guesses, samples, remaining, stops):
        return verify.verify(samples[:, :-1], samples, remaining, stops)

    judged(patch, mutation)


def one_token_too_many(patch):
    def mutation(verdict, guesses, samples, remaining, stops):
        return verify.verify(guesses, samples, remaining + 1, stops)

    judged(patch, mutation)


def eos_seen_at_the_last_position_only(patch):
    def flags(honest, self, rows, samples):
        found = honest(self, rows, samples)
        found[:, :-1] = False
        return found

    wrap(patch, Stops, "flags", flags)


def no_rollback(patch):
    def commit(honest, self, samples, verdict, hidden):
        honest(self, samples, verdict, hidden)
        late = self.rows.length[: self.rows.count] < 30
        self.rows.length[: self.rows.count] += late.long()
        self.rows.lengths[: self.rows.count] += late.numpy()

    wrap(patch, Rollout, "commit", commit)


def blind_to_itself(patch):
    patch.setattr(masks, "causal_mask", lambda positions, *args: causal_mask(positions - 1, *args))


def sees_the_future(patch):
    patch.setattr(masks, "causal_mask", lambda positions, *args: causal_mask(positions + 1, *args))


def sliding_window_ignored(patch):
    patch.setattr(masks, "causal_mask", lambda positions, extent, window, first: causal_mask(positions, extent))


def results_in_order_of_completion(patch):
    def completions(honest, self):
        return sorted(honest(self), key=lambda c: len(c.token_ids))

    wrap(patch, Results, "completions", completions)


MUTATIONS = [
    position_off_by_one,
    stale_cache_after_a_move,
    siblings_left_empty,
    copy_one_entry_short,
    noise_reused_at_the_next_position,
    stale_noise_after_a_move,
    stale_noise_after_an_admission,
    key_not_moved,
    unprocessed_logits,
    penalty_ignores_the_guesses,
    penalty_sees_all_the_guesses,
    penalty_notes_rejected_guesses,
    missing_bonus_token,
    guesses_taken_unverified,
    one_token_too_many,
    eos_seen_at_the_last_position_only,
    no_rollback,
    blind_to_itself,
    sees_the_future,
    sliding_window_ignored,
    results_in_order_of_completion,
]


def test_the_engine_as_it_is_passes():
    check()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_mutation_is_noticed(mutation, monkeypatch):
    drawn()
    # the probe must not come before the tokens
    monkeypatch.setattr(Target, "_probe", unprobed)
    mutation(monkeypatch)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check()
