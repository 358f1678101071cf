"""Head and table together: whoever has been right more often guesses, and no token changes, whatever they say."""

import pytest
import torch

from spec_rollout.draft.arbiter import PLACES, TYPICAL, Arbiter, joint_rates
from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.head_passes import Guess
from spec_rollout.draft.ngrams import History
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.rows import Rows
from spec_rollout.gamma import FixedGamma
from spec_rollout.records import SamplingParams
from tests.backends.learned import backend_for
from tests.tiny import DEVICE, PROMPTS, Scripted, assert_same, policy

PARAMS = SamplingParams(max_new_tokens=30, temperature=0.5, eos_token_ids=(4,))
KINDS = len(TYPICAL) ** 2


def tokens_of(completions, prompts=PROMPTS):
    return [(p, c.token_ids) for p, c in zip(prompts, completions, strict=True)]


def drafter_for(model, history) -> EagleDrafter:
    """A head that has learned nothing, and the table of `history`."""
    head = EagleHead(HeadConfig.for_target(model.config), 1).to(DEVICE).eval()
    drafter = EagleDrafter(head, PolicyView(model))
    drafter.ready, drafter.arbiter = True, Arbiter(history, drafter.view)
    return drafter


def history_of(kind, expected) -> History:
    history, right = History(DEVICE), tokens_of(expected)
    if kind == "right":
        history.add(right * 3)
    elif kind == "wrong":
        history.add([(p, [(t + 1) % 11 for t in c]) for p, c in right])
    elif kind == "random":
        random = torch.randint(0, 11, (20, 40), generator=torch.Generator().manual_seed(0)).tolist()
        history.add([([5], r) for r in random])
    return history


@pytest.mark.parametrize("kind", ["right", "wrong", "random", "empty"])
@pytest.mark.parametrize("greedy", [False, True])
def test_no_token_changes(kind, greedy):
    model = policy("llama")
    params = SamplingParams(max_new_tokens=30, temperature=0.0 if greedy else 0.5, eos_token_ids=(4,))
    expected = RolloutEngine(model).generate(PROMPTS, params, seed=(3,))
    drafter = drafter_for(model, history_of(kind, expected))
    for broken in (None, torch.nan, 0.0, 1e9):
        if broken is not None:
            drafter.arbiter.right.fill_(broken)
        engine = RolloutEngine(model, drafter=drafter, controller=Scripted(3, 0, 5, 1))
        assert_same(engine.generate(PROMPTS, params, seed=(3,)), expected)
        assert not engine.stats.drafter_failures and engine.stats.drafted


def test_a_head_of_nan_leaves_the_tokens_and_the_table_alone():
    model = policy("llama")
    expected = RolloutEngine(model).generate(PROMPTS, PARAMS, seed=(3,))
    drafter = drafter_for(model, history_of("right", expected))
    with torch.no_grad():
        drafter.head.fc.weight.fill_(torch.nan)
    engine = RolloutEngine(model, drafter=drafter, controller=FixedGamma(3))
    assert_same(engine.generate(PROMPTS, PARAMS, seed=(3,)), expected)
    assert engine.stats.acceptance_rate > 0.5 and drafter.arbiter.right.isfinite().all()


def test_who_was_right_where_they_differ_guesses():
    """A useless head and a table of the very completions: within a rollout, nearly all guesses become the table's."""
    model = policy("llama")
    expected = RolloutEngine(model).generate(PROMPTS, PARAMS, seed=(3,))
    rates = []
    for kind in ("right", "wrong"):
        drafter = drafter_for(model, history_of(kind, expected))
        engine = RolloutEngine(model, drafter=drafter, controller=FixedGamma(3))
        for _ in range(2):
            engine.stats.steps.clear()
            engine.generate(PROMPTS, PARAMS, seed=(3,))
        rates.append(engine.stats.acceptance_rate)
        share = int(drafter.arbiter.taken) / engine.stats.drafted
        assert share > 0.9 if kind == "right" else share < 0.9
    assert rates[0] > 0.8 > 0.2 > rates[1]


def made_up(known, history):
    """Rows with `known` tokens, and an arbiter about to judge guesses for them."""
    rows = Rows(len(known), 20, 11, DEVICE)
    rows.count = len(known)
    for row, tokens in enumerate(known):
        rows.tokens[row, : len(tokens)] = torch.tensor(tokens)
        rows.length[row] = len(tokens) - 1
    arbiter = Arbiter(history, PolicyView(policy("llama")))
    arbiter.begin()
    arbiter.start(rows)
    return rows, arbiter


def guess(tokens, sure):
    """Of a head that gave them about that probability."""
    scores = torch.zeros(len(tokens), 11)
    for row, (token, p) in enumerate(zip(tokens, sure, strict=True)):
        scores[row, token] = torch.tensor(p / (1 - p) * 10).log()
    return Guess(torch.tensor(tokens)[:, None], scores, torch.zeros(len(tokens), 1, 4))


def test_what_is_counted():
    """By hand: the table says 7 behind 5 6, and then 8; the head was sure of 9, then not sure of 8 and 3."""
    history = History(DEVICE)
    history.add([([5], [6, 7, 8])])
    rows, arbiter = made_up([[5, 6], [5, 6]], history)
    before = arbiter.right.clone()
    assert arbiter.choose(guess([9, 9], [0.99, 0.5]), None).tokens.tolist() == [[9], [7]]  # 1.0 beats 0.45, not 0.99
    arbiter.right[:] = torch.tensor([2.0, 1.0])
    arbiter.start(rows)
    before = arbiter.right.clone()
    assert arbiter.choose(guess([9, 9], [0.99, 0.5]), None).tokens.tolist() == [[7], [7]]
    assert arbiter.choose(guess([8, 3], [0.2, 0.2]), None).tokens.tolist() == [[8], [8]]
    rows.tokens[:, 2:5] = torch.tensor([[7, 8, 1], [9, 2, 1]])
    start, rows.length[:] = rows.length.clone(), torch.tensor([4, 2])  # the second row's first guess failed
    arbiter.observe(rows, start)
    counted = arbiter.right - before
    sure, unsure, table = 3, 1, 3
    assert counted[table * 4 + sure].tolist() == [1, 0]
    assert counted[table * 4 + unsure].tolist() == [0, 1]
    assert counted.sum() == 2  # the second place: agreed in one row, not reached in the other
    assert counted.shape == (PLACES * KINDS, 2) and int(arbiter.taken) == 5


def test_a_place_in_a_step_is_judged_by_itself():
    history = History(DEVICE)
    history.add([([5], [6, 7, 8, 1, 2, 3, 9, 10])])
    rows, arbiter = made_up([[5, 6]], history)
    arbiter.right.zero_()
    arbiter.right.view(PLACES, KINDS, 2)[2:, :, 0] = 1
    arbiter.start(rows)
    chosen = [arbiter.choose(guess([0], [0.5]), None).tokens.item() for _ in range(2)]
    arbiter._recent = torch.tensor([[-1, -1, -1, -1, -1, 5, 6, 7]])
    chosen += [arbiter.choose(guess([0], [0.5]), None).tokens.item() for _ in range(4)]
    assert chosen == [0, 0, 8, 1, 2, 3]


def test_what_is_expected_of_both():
    assert joint_rates([0.6, 0.2], [0.5]) == pytest.approx([0.6 + 0.5 * 0.4 * 0.5, 0.5 + 0.5 * 0.5 * 0.2])
    assert joint_rates([], [0.5]) == [0.5] and joint_rates([0.5], []) == [0.5]


def test_in_a_backend_both_guess_and_it_is_told_whose_guesses_were_taken(tmp_path):
    backend = backend_for("llama", tmp_path, draft_ngrams=True)
    plain = RolloutEngine(policy("llama"))
    for turn in range(3):
        backend.take_stats()
        expected = plain.generate(PROMPTS * 4, PARAMS, seed=(turn,))
        assert_same(backend.generate(PROMPTS * 4, PARAMS, seed=(turn,)), expected)
        backend.refresh(0.5)
    assert backend.drafter.arbiter is backend.arbiter
    assert 0 < backend.stats.ngram_drafted < backend.stats.drafted


def test_rejection_takes_guesses_from_one_of_them(tmp_path):
    backend = backend_for("llama", tmp_path, draft_ngrams=True, verification="rejection")
    for turn in range(3):
        backend.generate(PROMPTS * 4, PARAMS, seed=(turn,))
        backend.refresh(0.5)
    assert backend.stats.drafted and backend.drafter.arbiter is None and not backend.stats.drafter_failures
