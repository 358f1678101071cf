"""`verification="rejection"`: the target's law, whatever the guesses, but other tokens at another γ."""

from collections import Counter

import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter, RandomDrafter
from spec_rollout.engine import rejection
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.gumbel_max import draw_among
from spec_rollout.engine.rejection import Proposal
from spec_rollout.records import SamplingParams
from tests.engine.test_law import (
    DRAWS,
    FALSE_ALARM,
    LAWS,
    MODEL,
    PROMPT,
    VOCAB,
    ContraryDrafter,
    NoiseDrafter,
    fits,
    joint_law,
)
from tests.tiny import PROMPTS, Scripted, assert_same, policy, reference


class ModelDrafter(RandomDrafter):
    """Draws its guesses from fixed scores of the tokens `ids`, by the noise, and says so."""

    def __init__(self, scores, ids=None):
        self.scores, self.ids = torch.tensor(scores), None if ids is None else torch.tensor(ids)

    def propose(self, rows, gamma, noise, temperature):
        z = self.scores.repeat(rows.count, 1)
        chosen = [draw_among(z, noise[:, i], self.ids, VOCAB) for i in range(gamma)]
        self.drawn = z[:, None].expand(-1, gamma, -1)
        guesses = torch.stack(chosen, 1)
        return guesses if self.ids is None else self.ids[guesses]

    def proposal(self):
        return Proposal(self.drawn, self.ids)


DRAFTERS = {
    "uniform": RandomDrafter(),
    "by the noise": NoiseDrafter(),
    "against the noise": ContraryDrafter(),
    "model": ModelDrafter([0.5, -1.0, 1.0, 0.0]),
    "two tokens": ModelDrafter([1.0, -0.5], [1, 2]),
}


def draws(params: SamplingParams, drafter, seed: int = 0) -> Counter:
    config = SpecConfig(max_slots=2000, verification="rejection")
    engine = RolloutEngine(MODEL, config, drafter=drafter, controller=Scripted(1, 3, 0, 2))
    completions = engine.generate([PROMPT] * DRAWS, params, seed=(seed,))
    assert 0 < engine.stats.accepted < engine.stats.drafted
    return Counter(tuple(c.token_ids) for c in completions)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_joint_law(law, drafter):
    assert fits(draws(LAWS[law], DRAFTERS[drafter]), joint_law(LAWS[law])) > FALSE_ALARM


@pytest.mark.parametrize("broken", ["accepts all", "no residual", "wrong q", "one noise for all"])
def test_control_a_broken_rejection_is_rejected(broken, monkeypatch):
    honest = rejection.draw_by_rejection

    def mutated(z, noise, guesses, proposal, room):
        gamma = guesses.shape[1]
        if broken == "accepts all":
            samples, *rest = honest(z, noise, guesses, proposal, room)
            return torch.cat([guesses, samples[:, gamma:]], 1), *rest
        if broken == "no residual":
            samples, *rest = honest(z, noise, guesses, proposal, room)
            again, *_ = honest(z, noise, guesses[:, :0], None, torch.empty_like(room))
            again[:, :gamma] = torch.where(samples[:, :gamma] == guesses, guesses, again[:, :gamma])
            return again, *rest
        if broken == "wrong q" and gamma:
            return honest(z, noise, guesses, proposal._replace(scores=-proposal.scores), room)
        if broken == "one noise for all":
            noise = noise[..., -1:].expand_as(noise)
        return honest(z, noise, guesses, proposal, room)

    monkeypatch.setattr("spec_rollout.engine.rollout.draw_by_rejection", mutated)
    with pytest.raises(AssertionError):
        assert fits(draws(LAWS["T=1"], DRAFTERS["two tokens"]), joint_law(LAWS["T=1"])) > FALSE_ALARM


def test_an_equal_draft_is_always_accepted():
    """It accepts with probability 1 - TV(p, q): all, if p = q."""
    z = torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(0))
    guesses = torch.randint(10, (3, 4), generator=torch.Generator().manual_seed(1))
    noise = -torch.empty(3, 5, 8).exponential_(generator=torch.Generator().manual_seed(2)).log()
    samples, normaliser, distrusted = rejection.draw_by_rejection(
        z, noise, guesses, Proposal(z[:, :4], None), torch.empty(3, 5, 10)
    )
    assert not distrusted.any()
    assert torch.equal(samples[:, :4], guesses)
    torch.testing.assert_close(normaliser, z.logsumexp(-1))


def test_greedy_is_plain_decoding():
    model, params = policy("llama"), SamplingParams(max_new_tokens=12, temperature=0)
    expected = reference(model, PROMPTS, params)
    config = SpecConfig(num_speculative_tokens=3, verification="rejection")
    engine = RolloutEngine(model, config, drafter=OracleDrafter(expected))
    assert_same(engine.generate(PROMPTS, params), expected)
    assert engine.stats.mean_acceptance_length > 1


def test_the_same_seed_and_guesses_give_the_same_tokens_another_gamma_does_not():
    """Reproducible, but not independent of the draft."""
    drawn = []
    for gamma in (3, 3, 1):
        config = SpecConfig(num_speculative_tokens=gamma, verification="rejection")
        engine = RolloutEngine(MODEL, config, drafter=ModelDrafter([0.5, -1.0, 1.0, 0.0]))
        drawn.append([c.token_ids for c in engine.generate([PROMPT] * 20, SamplingParams(max_new_tokens=20))])
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_is_certain_is_accepted_even_where_the_number_drawn_rounds_to_1():
    z = torch.full((1, 2, VOCAB), -torch.inf)
    z[..., 1] = 0.0
    noise = torch.full((1, 2, rejection.noise_width(VOCAB) + 1), 22.0)
    for proposal in (None, Proposal(torch.zeros(1, 1, VOCAB).index_fill(2, torch.tensor([1]), 200.0), None)):
        drawn, *_ = rejection.draw_by_rejection(z, noise, torch.tensor([[1]]), proposal, torch.empty_like(z))
        assert drawn[0, 0] == 1


NOT_DRAWN_FROM = {
    "NaN": lambda p: p._replace(scores=p.scores * torch.nan),
    "one NaN": lambda p: p._replace(scores=p.scores.index_fill(2, torch.tensor([0]), torch.nan)),
    "infinite": lambda p: p._replace(scores=p.scores + torch.inf),
    "integers": lambda p: p._replace(scores=p.scores.long()),
    "flat": lambda p: p._replace(scores=p.scores[0]),
    "too narrow": lambda p: p._replace(scores=p.scores[..., 1:]),
    "a row too many": lambda p: p._replace(scores=torch.cat([p.scores, p.scores[:1]])),
    "a guess too few": lambda p: p._replace(scores=p.scores[:, 1:]),
    "ids out of order": lambda p: p._replace(ids=torch.tensor([1, 0, 2, 3])),
    "ids beyond the vocabulary": lambda p: p._replace(ids=torch.tensor([0, 1, 2, 99])),
    "ids without the guess": lambda p: p._replace(scores=p.scores[..., :1], ids=torch.tensor([VOCAB - 1])),
    "ids as floats": lambda p: p._replace(ids=torch.arange(4.0)),
    "guess of no weight": lambda p: p._replace(scores=p.scores.fill_(-1e4).index_fill(2, torch.tensor([3]), 1e4)),
    "not a proposal": lambda p: 7,
    "no tensors": lambda p: ([0.5], None),
}


@pytest.mark.parametrize("breakage", NOT_DRAWN_FROM)
def test_a_broken_proposal_costs_no_token_and_keeps_the_law(breakage):
    """It is off with one warning; the guesses at hand are taken as given."""

    class Liar(ModelDrafter):
        def propose(self, *args):
            return super().propose(*args).clamp(max=2)  # the last id is never guessed

        def proposal(self):
            return NOT_DRAWN_FROM[breakage](Proposal(super().proposal().scores, None))

    config = SpecConfig(num_speculative_tokens=2, max_slots=2000, verification="rejection")
    engine = RolloutEngine(MODEL, config, drafter=Liar([0.5, -1.0, 1.0, 0.0]))
    with pytest.warns(RuntimeWarning, match="drafter broke and is off") as caught:
        completions = engine.generate([PROMPT] * DRAWS, LAWS["T=1"])
    assert len(caught) == 1 and engine.stats.drafter_failures == 1
    assert fits(Counter(tuple(c.token_ids) for c in completions), joint_law(LAWS["T=1"])) > FALSE_ALARM
