"""Drafters that break, lie or meddle cost speed, never tokens."""

import warnings

import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter, RandomDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.rows import Rows
from spec_rollout.records import SamplingParams
from tests.tiny import PROMPTS, VOCAB, Scripted, assert_same, cut, make_policy, policy, reference

PARAMS = SamplingParams(max_new_tokens=16)


class Broken(OracleDrafter):
    """Right until `verb` has been called `good` times, then broken in the way that `breakage` says."""

    def __init__(self, completions, verb, breakage, good):
        super().__init__(completions)
        self.calls = 0
        honest = getattr(self, verb)

        def breaks(rows, *args):
            self.calls += 1
            return honest(rows, *args) if self.calls <= good else breakage(rows, *args)

        setattr(self, verb, breaks)


def raises(error):
    def breakage(*_):
        raise error

    return breakage


BREAKAGES = {
    "raises": raises(RuntimeError("broke")),
    "out of memory": raises(torch.OutOfMemoryError("CUDA out of memory")),
    "odd exception": raises(KeyError("d2t")),
    "assertion": raises(AssertionError("shape")),
    "too wide": lambda rows, gamma, *_: torch.zeros(rows.count, gamma + 1, dtype=torch.int64),
    "a row too many": lambda rows, gamma, *_: torch.zeros(rows.count + 1, gamma, dtype=torch.int64),
    "a row too few": lambda rows, gamma, *_: torch.zeros(rows.count - 1, gamma, dtype=torch.int64),
    "flat": lambda rows, gamma, *_: torch.zeros(rows.count, dtype=torch.int64),
    "deep": lambda rows, gamma, *_: torch.zeros(rows.count, gamma, 1, dtype=torch.int64),
    "NaN": lambda rows, gamma, *_: torch.full((rows.count, gamma), torch.nan),
    "float": lambda rows, gamma, *_: torch.zeros(rows.count, gamma),
    "None": lambda *_: None,
    "beyond the vocabulary": lambda rows, gamma, *_: torch.full((rows.count, gamma), VOCAB),
    "negative": lambda rows, gamma, *_: torch.full((rows.count, gamma), -1),
    "one bad id": lambda rows, gamma, *_: torch.arange(rows.count * gamma).view(rows.count, gamma).sub_(1),
}


def check_switched_off(verb, breakage, good=2, **config) -> None:
    expected = cut(reference(policy("llama"), PROMPTS, PARAMS), (11, 12, 13))
    params = SamplingParams(max_new_tokens=16, eos_token_ids=(11, 12, 13))
    controller = Scripted(3)
    drafter = Broken(expected, verb, breakage, good)
    engine = RolloutEngine(policy("llama"), SpecConfig(**config), drafter=drafter, controller=controller)
    with pytest.warns(RuntimeWarning, match="drafter broke and is off.*plain decoding") as caught:
        got = engine.generate(PROMPTS, params)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    assert_same(got, expected)
    assert controller.steps[-1].gamma == 0 and engine.stats.drafter_failures == 1  # the metrics show it
    assert sum(c.num_drafted for c in got) == engine.stats.drafted
    assert engine.drafter is drafter  # the next rollout may try again


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_proposal(breakage):
    check_switched_off("propose", BREAKAGES[breakage])


@pytest.mark.parametrize(
    ("verb", "good"),
    [("begin", 0), ("admit", 0), ("admit", 1), ("observe", 0), ("observe", 4), ("copy", 0), ("finish", 1)],
)
def test_broken_verb(verb, good):
    check_switched_off(verb, BREAKAGES["raises"], good, max_slots=3)


class Meddler(OracleDrafter):
    """Writes wherever it can reach, and keeps what it was shown to write into it later."""

    def __init__(self, completions, gamma):
        super().__init__(completions)
        self.gamma, self.kept = gamma, []

    def meddle(self, *tensors) -> None:
        for rows in {id(r): r for r in self.kept}.values():
            for name in ("tokens", "length", "start", "limit", "request", "key", "logprobs", "steps", "counts"):
                getattr(rows, name).fill_(3)
            rows.lengths[:], rows.starts[:], rows.count = 1, 1, 1
        for tensor in tensors:
            tensor.data.fill_(5)

    def begin(self, rows):
        super().begin(rows)
        self.kept.append(rows)

    def propose(self, rows, gamma, noise, temperature):
        guesses = super().propose(rows, gamma, noise, temperature)
        self.kept.append(rows)
        self.meddle(*([] if noise is None else [noise]))
        self.last = guesses
        return guesses

    def observe(self, rows, slots, start, hidden):
        self.kept.append(rows)
        self.meddle(start, *hidden)
        if hasattr(self, "last"):
            self.last.fill_(4)

    def admit(self, rows, slots):
        self.meddle()

    def copy(self, rows, source, target):
        self.meddle(*map(torch.as_tensor, (*source, *target)))

    def finish(self, rows, slots):
        self.meddle(*map(torch.as_tensor, slots))


@pytest.mark.parametrize("params", [PARAMS, SamplingParams(max_new_tokens=16, temperature=0)])
@pytest.mark.parametrize("slots", [3, 64])
def test_a_drafter_that_writes_to_what_it_is_shown(slots, params):
    expected = reference(policy("llama"), PROMPTS, params)
    drafter = Meddler(expected, 3)
    engine = RolloutEngine(policy("llama"), SpecConfig(num_speculative_tokens=3, max_slots=slots), drafter=drafter)
    assert_same(engine.generate(PROMPTS, params), expected)
    assert engine.stats.mean_acceptance_length > 2 and engine.stats.drafter_failures == 0  # it guesses right meanwhile


def test_a_shorter_proposal_is_welcome():
    """A drafter may stop early; what it does not guess costs nothing."""
    expected = reference(policy("llama"), PROMPTS, PARAMS)
    drafter = OracleDrafter(expected)
    honest = drafter.propose
    drafter.propose = lambda rows, gamma, *rest: honest(rows, gamma, *rest)[:, : gamma // 2]
    controller = Scripted(4, 1)
    engine = RolloutEngine(policy("llama"), drafter=drafter, controller=controller)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = engine.generate(PROMPTS, PARAMS)
    assert_same(got, expected)
    assert [s.gamma for s in controller.steps[:4]] == [2, 0, 2, 0]
    assert engine.stats.mean_acceptance_length > 2.5


def test_interrupts_are_not_taken_for_a_broken_drafter():
    drafter = RandomDrafter()
    drafter.propose = raises(KeyboardInterrupt())
    engine = RolloutEngine(policy("llama"), SpecConfig(num_speculative_tokens=2), drafter=drafter)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, PARAMS)


@pytest.mark.parametrize("loss", ["raises", "ValueError"])
def test_a_failing_policy_is_not_hidden(loss):
    """Only the drafter may break in silence: an error of the policy itself reaches the caller."""
    model = make_policy("llama")
    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=2), drafter=RandomDrafter())
    engine.generate([[1]], SamplingParams(max_new_tokens=1))
    model.lm_head.register_forward_hook(raises(RuntimeError("policy") if loss == "raises" else ValueError("policy")))
    with pytest.raises((RuntimeError, ValueError), match="policy"):
        engine.generate(PROMPTS, PARAMS)


COPIED_ALONE = [[1, 2, 3], [4, 5, 6], [1, 2, 3]]
"""With two slots the last one copies the first one's when the second has left: nothing is read."""


@pytest.mark.parametrize(
    ("prompts", "limits", "slots"), [(PROMPTS, [16] * len(PROMPTS), 3), (COPIED_ALONE, [16, 2, 16], 2)]
)
def test_what_a_drafter_is_shown_is_what_is_known(prompts, limits, slots, monkeypatch):
    """Through admissions, moves and every number of guesses, though only news are copied."""
    show, calls = Rows.show, []

    def checked(self, onlooker, news=None):
        shown = show(self, onlooker, news)
        for slot in range(self.count):
            known = int(self.lengths[slot]) + 1
            assert shown.tokens[slot, :known].tolist() == self.tokens[slot, :known].tolist()
        assert shown.counts[: self.count].tolist() == self.counts[: self.count].tolist()
        calls.append(news)
        return shown

    monkeypatch.setattr(Rows, "show", checked)
    expected = reference(policy("llama"), prompts, PARAMS, max_new_tokens=limits)
    controller = Scripted(3, 0, 7, 1)
    engine = RolloutEngine(
        policy("llama"), SpecConfig(max_slots=slots), drafter=OracleDrafter(expected), controller=controller
    )
    assert_same(engine.generate(prompts, PARAMS, max_new_tokens=limits), expected)
    assert {0, 1, 4, None} <= set(calls)
