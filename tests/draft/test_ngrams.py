"""Guesses from earlier rollouts: the table is what counting by hand gives, and no token of a rollout changes."""

import math
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tests.tiny
from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.config import SpecConfig
from spec_rollout.draft import ngrams
from spec_rollout.draft.ngrams import CANDIDATES, LONGEST, ORDERS, History, NgramTable
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.gumbel_max import draw, draw_among, noise_width
from spec_rollout.records import SamplingParams
from tests.tiny import PROMPTS, assert_same, policy

CPU = tests.tiny.DEVICE
PARAMS = SamplingParams(max_new_tokens=40, temperature=0.3, eos_token_ids=(4,))


def followers(sequences):
    """By hand: what followed each run, and how often."""
    found = defaultdict(Counter)
    for sequence in sequences:
        for i in range(1, len(sequence)):
            for order in ORDERS:
                if i >= order:
                    found[tuple(sequence[i - order : i])][sequence[i]] += 1
    return found


def recent(tokens):
    return torch.tensor([([-1] * LONGEST + list(tokens))[-LONGEST:]])


sequences = st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=30), min_size=1, max_size=5)


@given(sequences, st.lists(st.integers(0, 3), min_size=1, max_size=12))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_longest_known_run_counts(sequences, ending):
    table, by_hand = NgramTable([torch.tensor(s) for s in sequences], CPU), followers(sequences)
    runs = [tuple(ending[-order:]) for order in ORDERS if order <= len(ending)]
    known = [run for run in runs if run in by_hand]
    assume(known)
    place, known_to_it = table.find(recent(ending))
    assert known_to_it
    tokens, scores = table.tokens[place][0].tolist(), table.scores[place][0].tolist()
    counts = by_hand[known[-1]]
    kept = sorted(counts.values(), reverse=True)[:CANDIDATES]
    assert [round(float(torch.tensor(s).exp())) for s in scores] == kept + [0] * (CANDIDATES - len(kept))
    assert all(counts[token] == count for token, count in zip(tokens, kept, strict=False))


def test_guesses_go_on_from_guesses():
    table = NgramTable([torch.tensor([5, 6, 7, 8, 9])], CPU)
    assert table.guess(recent([1, 5]), 4, None, 10).tolist() == [[6, 7, 8, 9]]


def test_guesses_share_the_noise_of_the_target():
    """What was drawn from the counts themselves is always guessed, where the most frequent one is half the time."""
    table = NgramTable([torch.tensor([1, 2, 1, 3])], CPU)
    uniform = torch.rand(500, 1, noise_width(6), generator=torch.Generator().manual_seed(0))
    noise = -(-uniform.log()).log()
    z = torch.tensor([-torch.inf, -torch.inf, 0.0, 0.0, -torch.inf, -torch.inf])
    drawn = draw(z.expand(500, -1), noise[:, 0])[0]
    assert (table.guess(recent([1]).expand(500, -1), 1, noise, 6)[:, 0] == drawn).all()
    assert 0.4 < (drawn == 2).float().mean() < 0.6


def test_a_draw_is_that_among_the_followers():
    """All of them, whether they share a block of the vocabulary or not."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = 30
    table = NgramTable([torch.randint(0, vocabulary, (400,), generator=generator)], CPU)
    found = torch.randint(0, len(table.keys) - 1, (300,), generator=generator)
    uniform = torch.rand(300, noise_width(vocabulary), generator=generator)
    noise = -(-uniform.log()).log()
    token, share = table.draw(found, noise, vocabulary)
    chosen = draw_among(table.scores[found], noise, table.tokens[found], vocabulary)[:, None]
    assert torch.equal(token, table.tokens[found].gather(1, chosen))
    assert torch.equal(share, table.scores[found].softmax(1).gather(1, chosen))
    assert len(set(token[:, 0].tolist())) > 20


def test_nothing_is_known_of_a_run_that_was_not_met():
    table = NgramTable([torch.tensor([5, 6, 7])], CPU)
    assert table.find(recent([3, 5]))[1].item() and not table.find(recent([5, 3]))[1].item()
    assert not NgramTable([], CPU).find(recent([5]))[1].item()


def test_acceptance_is_measured_on_rollouts_that_the_table_has_not_seen():
    history = History(CPU)
    history.add([([1], [2, 3, 4, 5])])
    assert history.acceptance == []
    history.add([([1], [2, 3, 4, 9]), ([7], [8, 2, 3])])
    # Came true: 2 3 4 after 1, and 3 after 2; not 9, nor 8 and 2, which follow what was never seen.
    assert history.acceptance == pytest.approx([4 / 7, 2 / 3, 1 / 2])


def test_the_first_phase_is_judged_by_its_first_half():
    history = History(CPU)
    history.add([([1], [2, 3, 4]), ([1], [2, 3, 9])])
    assert history.acceptance == pytest.approx([2 / 3, 1 / 2, 0.0])
    assert len(history.sequences) == 2 and history.table.guess(recent([3]), 1, None, 10).item() in (4, 9)


def test_the_oldest_rollouts_give_way(monkeypatch):
    monkeypatch.setattr(ngrams, "MAX_TOKENS", 10)
    history = History(CPU)
    for phase in range(5):
        history.add([([phase], [1, 2, 3])])
    assert [s[0].item() for s in history.sequences] == [3, 4]
    history.add([([9], list(range(20)))])
    assert [len(s) for s in history.sequences] == [21]  # one that is too long alone stays


@given(st.lists(sequences, min_size=1, max_size=6), st.sampled_from([10, 30, 1000]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_table_brought_up_to_date_is_one_made_anew(phases, most):
    history = History(CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "MAX_TOKENS", most)
        for phase in phases:
            history.add([(s[:1], s[1:]) for s in phase])
            table, anew = history.table, NgramTable(history.sequences, CPU)
            for name in ("keys", "tokens", "scores"):
                assert torch.equal(getattr(table, name), getattr(anew, name))


def backend_for(tmp_path, gamma, **options):
    config = SpecConfig(num_speculative_tokens=gamma, calibration_cache=str(tmp_path), **options)
    return EmbeddedBackend(policy("llama"), config)


@pytest.mark.parametrize("gamma", [3, None])
@pytest.mark.parametrize("slots", [2, 64])
def test_the_second_rollout_guesses_from_the_first_and_no_token_changes(gamma, slots, tmp_path):
    backend = backend_for(tmp_path, gamma, max_slots=slots)
    plain = RolloutEngine(policy("llama"))
    for turn in range(3):
        backend.take_stats()
        if turn == 1 and gamma is None:  # whether it pays is the machine's business
            backend.ngrams.calibrate(backend.engine, slots)
            backend.ngrams.controller.choose = lambda rows, context: 1 + rows % 4
        expected = plain.generate(PROMPTS * 4, PARAMS, seed=(turn,))
        assert_same(backend.generate(PROMPTS * 4, PARAMS, seed=(turn,)), expected)
        assert (backend.stats.mean_acceptance_length > 1) == (turn > 0)
        assert backend.stats.ngram_drafted == backend.stats.drafted
        backend.refresh(0.0)
    assert backend.learner.buffer.tokens  # features are gathered all the same


def test_the_faster_source_guesses(tmp_path):
    """Whatever the head is worth, the better of the two is chosen, and the head when the history is off."""
    backend = backend_for(tmp_path, 3, draft_overhead=1e9)
    backend.generate(PROMPTS * 4, PARAMS)
    backend.drafter.ready, backend.head.watched.controller.draft_ready = True, True
    backend.history.acceptance = [0.5, 0.5, 0.5]
    backend._choose_source()
    assert backend.engine.drafter is backend.drafter and backend.drafter.arbiter is not None  # both together
    backend.sources.joint.expected_seconds = lambda *given: lambda rates: math.inf
    for head, chosen in (([0.9] * 3, backend.head), ([0.1] * 3, backend.ngrams), ([0.6, 0.6, 0.1], backend.head)):
        backend.learner.proven = head
        backend._choose_source()
        assert backend.engine.drafter is chosen.drafter and backend.drafter.arbiter is None


def test_nothing_is_kept_when_it_is_off_or_only_evaluated(tmp_path):
    off = backend_for(tmp_path, 3, draft_ngrams=False)
    off.generate(PROMPTS, PARAMS)
    on = backend_for(tmp_path, 3)
    on.generate(PROMPTS, PARAMS, collect=False)
    assert not off.history and not on.history


def test_it_serves_without_a_head_that_learns(tmp_path):
    backend = backend_for(tmp_path, 3, draft_refresh=False)
    for _ in range(2):
        backend.take_stats()
        backend.generate(PROMPTS * 4, PARAMS)
        backend.refresh()
    assert backend.stats.mean_acceptance_length > 1.3 and backend.draft_version == 0 and backend.draft_healthy
    assert not backend.learner.buffer.samples


def test_a_young_head_waits_until_it_is_seen_to_guess_better(tmp_path):
    """What it reaches right after training says less than what it reached, before it, on prompts new to it."""
    backend = backend_for(tmp_path, 3, draft_overhead=1e9)
    backend.generate(PROMPTS * 4, PARAMS)
    backend.history.add([([1], [2, 3, 4])])
    backend.history.acceptance = [0.5] * 3
    backend.learner.acceptance, backend.learner.proven = [0.9] * 3, [0.2] * 3
    backend.sources.joint.expected_seconds = lambda *given: lambda rates: math.inf
    backend.drafter.ready = backend.head.watched.controller.draft_ready = True
    backend._choose_source()
    assert backend.engine.drafter is backend.ngrams.drafter
    backend.learner.proven = [0.7] * 3
    backend._choose_source()
    assert backend.engine.drafter is backend.drafter
