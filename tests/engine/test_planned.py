"""Confidence decides how far rows guess, and no token depends on it, whatever it says."""

import itertools

import numpy as np
import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.gamma.confidence import Confidence
from spec_rollout.gamma.plan import Plan, Prices
from tests.engine.test_equality import LAWS, cut, drawn, two_eos
from tests.tiny import PROMPTS, VOCAB, assert_same, policy

DEPTH = 5
SAYS = {
    "right": lambda true: torch.where(true, 0.97, 0.05),
    "constant": lambda true: torch.full(true.shape, 0.9),
    "reversed": lambda true: torch.where(true, 0.05, 0.97),
    "random": lambda true: torch.rand(true.shape, generator=torch.Generator().manual_seed(int(true.sum()))),
    "NaN": lambda true: torch.full(true.shape, torch.nan),
    "no probability": lambda true: torch.where(true, torch.inf, -3.0),
}


class Unsure(OracleDrafter):
    """About a quarter of its guesses are wrong; it says of each what `says` makes of whether it is right."""

    tells_confidence = True

    def __init__(self, completions, says):
        super().__init__(completions)
        self.says = says

    def propose(self, rows, gamma, noise, temperature, further=None):
        right = super().propose(rows, gamma, noise, temperature)
        place = rows.progress()[:, None] + torch.arange(gamma)
        true = (rows.request[: rows.count, None] * 5 + place * 3) % 4 > 0
        guesses = torch.where(true, right, (right + 1) % VOCAB)
        made = gamma
        if further is not None:
            made = next((i + 1 for i in range(gamma) if not further(self.says(true[:, i]))), gamma)
        return guesses[:, :made]


class Planning:
    """Leaves two of three steps to plans; the third guesses two tokens for all."""

    def __init__(self, price: float = 0.5, drafting: float = 1e-6):
        self.confidence, self.turns = Confidence(), itertools.cycle((True, True, False))
        self.price, self.drafting = price, drafting
        self.steps = []

    def choose(self, batch_size, context):
        return 2

    def plan(self, batch_size, context):
        if not next(self.turns):
            return None
        guesses = np.arange(DEPTH + 1)
        prices = Prices(1 + guesses * batch_size * 0.01, self.drafting * guesses, self.price / 0.01)
        return Plan(self.confidence, [0.7] * DEPTH, prices, batch_size)

    def observe(self, stats):
        self.steps.append(stats)


def decoded(name, law, says, controller, **options):
    eos = two_eos(drawn(name, law))
    expected = cut(drawn(name, law), eos)
    config = SpecConfig(**{"max_slots": 6, "max_num_speculative_tokens": DEPTH, **options})
    engine = RolloutEngine(policy(name), config, drafter=Unsure(drawn(name, law), SAYS[says]), controller=controller)
    params = LAWS[law].__class__(**{**vars(LAWS[law]), "max_new_tokens": 20, "eos_token_ids": eos})
    return engine, engine.generate(PROMPTS, params), expected


@pytest.mark.parametrize("says", SAYS)
@pytest.mark.parametrize(("name", "law"), [("llama", "T=1"), ("qwen3", "all"), ("gpt2", "T=1"), ("llama", "greedy")])
def test_tokens_are_those_of_plain_decoding(name, law, says):
    controller = Planning()
    engine, completions, expected = decoded(name, law, says, controller)
    assert_same(completions, expected)
    assert engine.stats.mean_acceptance_length > 1 and not engine.stats.drafter_failures
    planned = [step for step in controller.steps if step.depth is not None]
    assert planned
    assert len({step.gamma for step in planned}) > 1 or says in ("NaN", "no probability", "constant")
    assert sum(c.num_drafted for c in completions) == engine.stats.drafted
    assert sum(c.num_accepted for c in completions) == engine.stats.accepted


def test_right_confidence_has_fewer_wrong_guesses_verified():
    shares = {}
    for says in ("right", "constant", "reversed"):
        controller = Planning()
        decoded("llama", "T=1", says, controller, max_slots=1)
        planned = [step for step in controller.steps if step.depth is not None]
        shares[says] = sum(sum(s.accepted) for s in planned) / sum(s.rows * s.gamma for s in planned)
    assert shares["right"] > 0.85 > shares["reversed"] > shares["constant"] + 0.05  # the wrong way is learned too


def test_a_guess_that_was_not_verified_is_judged_by_the_sample_in_its_place():
    controller = Planning(price=1.1)  # no guess is worth it
    _, completions, expected = decoded("llama", "T=1", "right", controller)
    assert_same(completions, expected)
    planned = [step for step in controller.steps if step.depth is not None]
    assert {step.gamma for step in planned} == {0} and {step.depth for step in planned} == {1}
    judged, true = np.sum([step.judged[0] for step in planned], 0)
    assert 0.5 * judged < true < judged


def test_guessing_ends_where_it_costs_more_than_it_brings():
    controller = Planning(drafting=1.0)
    decoded("llama", "T=1", "right", controller)
    assert {step.depth for step in controller.steps if step.depth is not None} == {1}


def test_where_the_law_would_depend_on_it_there_is_no_plan():
    controller = Planning()
    decoded("llama", "T=1", "right", controller, verification="rejection")
    assert controller.steps and {step.depth for step in controller.steps} == {None}


def test_a_drafter_without_confidence_has_no_plan():
    controller = Planning()
    engine = RolloutEngine(policy("llama"), drafter=OracleDrafter(drawn("llama")), controller=controller)
    engine.generate(PROMPTS, LAWS["T=1"].__class__(max_new_tokens=20))
    assert {step.depth for step in controller.steps} == {None}


def test_a_drafter_that_tells_less_than_it_guesses_is_off():
    class Secretive(Unsure):
        def propose(self, rows, gamma, noise, temperature, further=None):
            return super().propose(rows, gamma, noise, temperature, further and (lambda p: True))

    controller = Planning()
    drafter = Secretive(drawn("llama"), SAYS["right"])
    engine = RolloutEngine(policy("llama"), drafter=drafter, controller=controller)
    with pytest.warns(RuntimeWarning, match="told its confidence in 0"):
        assert_same(engine.generate(PROMPTS, LAWS["T=1"].__class__(max_new_tokens=20)), drawn("llama"))
