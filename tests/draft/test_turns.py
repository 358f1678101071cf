"""Turns that read only what is new, with every kind of draft: guesses are as good as behind tokens read again."""

import copy

import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.entries import HeadEntries
from spec_rollout.draft.features import FeatureBuffer
from spec_rollout.draft.model_drafter import ModelDrafter
from spec_rollout.draft.mtp import MtpDrafter
from spec_rollout.draft.ngram_drafter import NgramDrafter
from spec_rollout.draft.ngrams import History
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.self_drafter import SelfDrafter
from spec_rollout.engine import beginnings
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.target import Target
from spec_rollout.records import SamplingParams
from tests.draft.test_mtp import random_head
from tests.engine.conversations import TOLD, Talk, keeping
from tests.engine.test_room import bounded
from tests.tiny import PROMPTS, Scripted, assert_same, policy

ROWS = len(PROMPTS)
GAMMAS = (3, 0, 0, 5, 1)


@pytest.fixture(autouse=True)
def short_beginnings(monkeypatch):
    monkeypatch.setattr(beginnings, "LEAST", 0)


def eagle(model, ready=True, buffer=None) -> EagleDrafter:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        head = EagleHead(HeadConfig.for_target(model.config)).eval()
    drafter = EagleDrafter(head, PolicyView(model), buffer)
    drafter.ready = ready
    return drafter


def mtp(model):
    drafter = MtpDrafter(random_head(model), PolicyView(model))
    drafter.ready = True
    return drafter


def itself(model):
    return ModelDrafter(Target(copy.deepcopy(model)), eagle(model).collector)


def in_8_bit(model):
    return SelfDrafter(Target(model), eagle(model).collector)


def ngrams(model):
    history = History(torch.device("cpu"))
    history.add([([1, 2, 3], [*range(4, 90)])])
    return NgramDrafter(history, eagle(model).collector)


KINDS = [("llama", eagle), ("gpt2", eagle), ("qwen3_5_text", eagle), ("qwen3_5_text", mtp)]
KINDS += [("llama", itself), ("gemma3_text", itself), ("llama", in_8_bit), ("llama", ngrams)]
KINDS += [("lfm2", lambda model: eagle(model, ready=False))]


def talks(name, make) -> tuple[Talk, Talk]:
    """One that keeps rows, and one that reads everything."""
    model, config = policy(name), SpecConfig(max_slots=4)
    engines = keeping(model, max_slots=4), RolloutEngine(model, config)
    for engine in engines:
        engine.drafter, engine.controller = make(model), Scripted(*GAMMAS)
    return tuple(Talk(engine, max_new_tokens=10) for engine in engines)


def guesses(completions) -> list[tuple[int, int]]:
    return [(c.num_drafted, c.num_accepted) for c in completions]


@pytest.mark.filterwarnings("error:The drafter broke")
@pytest.mark.parametrize(("name", "make"), KINDS)
def test_guesses_come_true_as_often(name, make):
    talk, whole = talks(name, make)
    for _ in range(3):
        got, expected = talk.take(), whole.take()
        assert_same(got, expected, 1e-3)
        assert guesses(got) == guesses(expected)
    assert talk.read[1:] == [TOLD * ROWS] * 2
    assert (talk.engine.stats.drafted > 0) == talk.engine.drafter.ready


def entries_of_another_row(patch):
    honest = HeadEntries.enter

    def enter(self, rows, slots, taken, kept):
        honest(self, rows, slots, taken, kept[1:] + kept[:1])

    patch.setattr(HeadEntries, "enter", enter)


def entries_not_caught_up(patch):
    patch.setattr(HeadEntries, "keep", lambda self, rows, slots: self._keep(rows, slots))


@pytest.mark.parametrize("mutation", [entries_of_another_row, entries_not_caught_up])
def test_mutation_is_noticed(mutation, monkeypatch):
    """Few guesses of a random head come true, but which ones it makes shows what it attends to."""
    mutation(monkeypatch)
    talk, whole = talks("llama", eagle)
    seen = []
    for one in (talk, whole):
        honest = one.engine.drafter.propose

        def propose(rows, *rest, honest=honest, one=one):
            found = honest(rows, *rest)
            seen.append((one, found.tolist()))
            return found

        one.engine.drafter.propose = propose
        one.go(3)
    mine, theirs = ([found for one, found in seen if one is each] for each in (talk, whole))
    with pytest.raises(AssertionError):
        assert mine == theirs


def test_the_same_guesses_are_made(monkeypatch):
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_mutation_is_noticed(lambda patch: None, monkeypatch)


def test_a_head_that_did_not_follow_has_all_read_again():
    """Another drafter guessed in the turn before."""
    model = policy("llama")
    talk, whole = talks("llama", ngrams)
    head, table = eagle(model), talk.engine.drafter
    for drafter, all_again in ((table, True), (head, True), (head, False), (table, False)):
        talk.engine.drafter, whole.engine.drafter = drafter, eagle(model)
        assert_same(talk.take(), whole.take())
        assert talk.read[-1] == (whole.read[-1] if all_again else TOLD * ROWS)


def test_features_to_train_on_are_those_of_new_tokens():
    buffers = [FeatureBuffer(10_000) for _ in range(2)]
    made = iter(buffers)
    for talk in talks("llama", lambda model: eagle(model, buffer=next(made))):
        talk.go(2)
    mine, theirs = (buffer.samples for buffer in buffers)
    assert len(mine) == len(theirs) == 2 * ROWS
    for a, b in zip(mine[ROWS:], theirs[ROWS:], strict=True):
        gone = len(b.tokens) - len(a.tokens)
        assert gone > 8 and a.first == b.first + gone and a.prompt == b.prompt == a.first + TOLD + 1
        assert torch.equal(a.tokens, b.tokens[gone:])
        torch.testing.assert_close(a.features, b.features[gone:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bound", [None, 64])
def test_features_of_rows_that_begin_alike_are_those_of_their_tokens(bound, monkeypatch):
    """Behind what an active row has read, with siblings, and where rows give way meanwhile."""
    monkeypatch.setattr(beginnings, "LEAST_WAITED_FOR", 1)
    model, buffer = policy("llama"), FeatureBuffer(10_000)
    begin = [n % 89 + 3 for n in range(0, 7 * 30, 7)]
    prompts = [[*begin, *tail] for tail in ([1, 2], [1, 2], [5], [9, 9, 9], [5], [8])]
    engine = RolloutEngine(
        model, SpecConfig(max_slots=4), drafter=eagle(model, buffer=buffer), controller=Scripted(*GAMMAS)
    )
    if bound is not None:
        engine = bounded(model, 3, bound, eagle(model, buffer=buffer))
    completions = engine.generate(prompts, SamplingParams(max_new_tokens=60))
    assert engine.stats.reused_tokens > len(begin) and (engine.stats.preemptions > 0) == (bound is not None)
    rows = [[*prompt, *c.token_ids] for prompt, c in zip(prompts, completions, strict=True)]
    assert len(buffer.samples) >= (len(prompts) if bound is None else 1)
    for sample in buffer.samples:
        place = slice(sample.first, sample.first + len(sample.tokens))
        (row, *_) = [row for row in rows if row[place][: len(sample.tokens)] == sample.tokens.tolist()]
        states = model(torch.tensor([row]), output_hidden_states=True).hidden_states
        layers = [*engine.drafter.head.config.aux_layers, -1]
        expected = torch.cat([states[i][0] for i in layers], -1)[place][: len(sample.features)]
        torch.testing.assert_close(sample.features, expected, atol=1e-4, rtol=1e-4)
    assert any(sample.first > 16 for sample in buffer.samples)


def test_with_a_head_in_a_small_pool():
    model = policy("llama")
    engine = bounded(model, 3, 96, eagle(model))
    engine.keep_rows()
    talk, whole = Talk(engine, max_new_tokens=16), Talk(RolloutEngine(model), max_new_tokens=16)
    for _ in range(3):
        assert_same(talk.take(), whole.take())
    assert engine.stats.cache_bytes <= engine.bound and engine.stats.drafter_failures == 0 < engine.stats.drafted
    assert engine.stats.preemptions > 0 and engine.stats.reused_tokens > whole.engine.stats.reused_tokens


@pytest.mark.parametrize("verb", ["keep", "takes", "enter"])
def test_a_drafter_that_breaks_costs_no_token(verb):
    talk, whole = talks("llama", eagle)
    assert_same(talk.take(), whole.take())
    setattr(talk.engine.drafter, verb, lambda *given: 1 / 0)
    with pytest.warns(RuntimeWarning, match="The drafter broke"):
        got = talk.take()
    assert_same(got, whole.take())
    assert talk.engine.stats.drafter_failures == 1
