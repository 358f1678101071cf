"""Scores that two passes of different shape may order differently are decided by the canonical pass."""

from dataclasses import replace

import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter, RandomDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.near_ties import NEAR_TIE
from spec_rollout.engine.target import Target
from spec_rollout.records import SamplingParams
from tests.engine.recorded import common, difference, recorded
from tests.tiny import (
    ARCHITECTURES,
    PROMPTS,
    VOCAB,
    Scripted,
    assert_same,
    cut,
    make_policy,
    policy,
    reference,
    unprobed,
)

PARAMS = SamplingParams(max_new_tokens=16)
LAWS = {
    "T=1": PARAMS,
    "greedy": replace(PARAMS, temperature=0),
    "cold": replace(PARAMS, temperature=0.4),
    "penalty": replace(PARAMS, temperature=0.8, repetition_penalty=1.3),
}


def run(model, params, drafter=None, slots=64, gammas=(0,)):
    config = SpecConfig(max_slots=slots)
    engine = RolloutEngine(model, config, drafter=drafter or RandomDrafter(), controller=Scripted(*gammas))
    return engine.generate(PROMPTS, params), engine.stats


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rounding_is_far_below_the_bound(name):
    """Passes of every shape differ by less than half of what the bound allows for, which is half the bound."""
    model = policy(name)
    plain, one = recorded(RolloutEngine(model, SpecConfig(num_speculative_tokens=0)), PROMPTS, PARAMS)
    wide = RolloutEngine(model, SpecConfig(num_speculative_tokens=7, max_slots=3), drafter=OracleDrafter(plain))
    completions, other = recorded(wide, PROMPTS, PARAMS)
    places = common(plain, completions)
    assert len(places) == sum(len(c.token_ids) for c in plain)
    canonical = {}
    with torch.no_grad():
        for index, position in places[:: len(places) // 12]:
            ids = torch.tensor([*PROMPTS[index], *plain[index].token_ids[:position]])
            canonical[index, position] = Target(model).canonical(ids)
    assert difference(one, other, places) < NEAR_TIE[torch.float32] / 4
    assert difference(one, canonical, list(canonical)) < NEAR_TIE[torch.float32] / 4


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_wide_bound_changes_nothing(name, law, monkeypatch):
    """With a bound of 1 a third of the tokens take the canonical pass, at any γ, and all stay the same."""
    monkeypatch.setitem(NEAR_TIE, torch.float32, 1.0)
    model, params = policy(name), LAWS[law]
    free = reference(model, PROMPTS, params)
    eos = (free[3].token_ids[9], free[0].token_ids[4])
    expected = cut(free, eos)
    total = sum(len(c.token_ids) for c in expected)
    for drafter, slots, gammas in (
        (None, 64, (0,)),
        (OracleDrafter(free), 64, (7, 2, 0)),
        (OracleDrafter(expected, shift=1), 2, (3,)),
    ):
        got, stats = run(model, replace(params, eos_token_ids=eos), drafter, slots, gammas)
        assert_same(got, expected)
        assert stats.near_ties > 0.1 * total
    assert stats.accepted == 0


def jitter(monkeypatch, size: float) -> None:
    """Let every pass of the decode loop round as badly as ±`size`, each in its own way."""
    honest = Target.forward
    generator = torch.Generator().manual_seed(0)

    def forward(self, *args, **kwargs):
        logits, hidden = honest(self, *args, **kwargs)
        return logits + size * (2 * torch.rand(logits.shape, generator=generator) - 1), hidden

    policy("llama")  # is probed with honest logits
    monkeypatch.setattr(Target, "_probe", unprobed)
    monkeypatch.setattr(Target, "forward", forward)


@pytest.mark.parametrize("law", LAWS)
def test_rounding_within_the_bound_is_made_good(law, monkeypatch):
    """Were rounding a thousand times worse, the tokens would still be the same at every γ; also at a temperature that
    magnifies it."""
    model, params = policy("llama"), LAWS[law]
    expected = reference(model, PROMPTS, params)
    jitter(monkeypatch, 0.1)
    monkeypatch.setitem(NEAR_TIE, torch.float32, 0.2 * params.repetition_penalty)
    for drafter, slots, gammas in (
        (None, 64, (0,)),
        (OracleDrafter(expected), 3, (7, 1, 4)),
        (OracleDrafter(expected, shift=1), 64, (2,)),
    ):
        got, stats = run(model, params, drafter, slots, gammas)
        assert [c.token_ids for c in got] == [c.token_ids for c in expected]
        assert stats.near_ties > 0


@pytest.mark.parametrize("law", ["greedy", "cold"])
def test_control_rounding_beyond_the_bound_is_not(law, monkeypatch):
    expected = reference(policy("llama"), PROMPTS, LAWS[law])
    jitter(monkeypatch, 0.1)
    monkeypatch.setitem(NEAR_TIE, torch.float32, 0.0)
    got, stats = run(policy("llama"), LAWS[law])
    assert [c.token_ids for c in got] != [c.token_ids for c in expected] and stats.near_ties == 0


def test_exact_ties():
    """Every output row twice: each greedy token is a tie, and the lower id wins by whatever path it came."""
    model = make_policy("llama")
    with torch.no_grad():
        model.lm_head.weight[VOCAB // 2 : -1] = model.lm_head.weight[: VOCAB // 2].clone()
    expected = reference(model, PROMPTS, LAWS["greedy"])
    for drafter, gammas in ((None, (0,)), (OracleDrafter(expected), (5, 2)), (RandomDrafter(), (3,))):
        got, stats = run(model, LAWS["greedy"], drafter, gammas=gammas)
        assert_same(got, expected)
        assert stats.near_ties >= 0.9 * len(PROMPTS) * 16


def test_near_ties_of_tiny_logits():
    """A nearly uniform policy, greedy: thousands of scores lie within the bound of each other."""
    model = make_policy("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-4)
    expected = reference(model, PROMPTS, LAWS["greedy"])
    got, stats = run(model, LAWS["greedy"], OracleDrafter(expected), gammas=(6, 1))
    assert_same(got, expected)
    assert stats.near_ties > 0 and stats.mean_acceptance_length > 2


def test_rare_in_practice():
    """The default bound costs next to nothing."""
    _, stats = run(policy("llama"), replace(PARAMS, max_new_tokens=60))
    assert stats.near_ties <= 2


EDGES = {
    "greedy": SamplingParams(max_new_tokens=16, temperature=0),
    "top_k=1": SamplingParams(max_new_tokens=16, top_k=1),
    "min_p=1": SamplingParams(max_new_tokens=16, min_p=1.0),
    "top_p=1e-6": SamplingParams(max_new_tokens=16, top_p=1e-6),
    "top_k=3": SamplingParams(max_new_tokens=16, top_k=3),
    "top_p=0.7": SamplingParams(max_new_tokens=16, top_p=0.7),
    "min_p=0.3": SamplingParams(max_new_tokens=16, min_p=0.3),
    "top_k beyond the vocabulary": SamplingParams(max_new_tokens=16, top_k=500),
    "all": SamplingParams(max_new_tokens=16, temperature=0.7, top_k=5, top_p=0.9, min_p=0.02),
    "cold and penalised": SamplingParams(max_new_tokens=16, temperature=0.3, top_k=3, repetition_penalty=3.0),
}


def near_duplicates(name: str = "llama", size: float = 1e-7):
    """Output rows in pairs that differ by `size` of themselves."""
    model = make_policy(name)
    with torch.no_grad():
        rows = model.lm_head.weight
        half = VOCAB // 2
        rows[half : 2 * half] = rows[:half] * (
            1 + size * torch.randn(half, 32, generator=torch.Generator().manual_seed(0))
        )
    return model


@pytest.mark.parametrize("law", EDGES)
def test_ties_at_the_edge_of_a_filter(law):
    """What is kept and what is thrown away is decided by the canonical pass where rounding could decide it."""
    model = near_duplicates()
    expected, _ = run(model, EDGES[law], slots=1)
    for drafter, slots, gammas in (
        (None, 64, (0,)),
        (OracleDrafter(expected), 64, (7, 2)),
        (RandomDrafter(), 2, (3,)),
    ):
        got, stats = run(model, EDGES[law], drafter, slots, gammas)
        assert_same(got, expected, 1e-3 if law == "cold and penalised" else 1e-4)  # which magnify rounding tenfold
        assert stats.near_ties > 0 or law in ("top_k beyond the vocabulary", "min_p=0.3")  # which meets no tie here


@pytest.mark.parametrize("law", EDGES)
def test_edges_are_rare_in_practice(law):
    """Counted in tokens: without near-duplicates next to nothing is settled."""
    _, stats = run(policy("llama"), EDGES[law])
    assert stats.near_ties <= 3  # of 112


@pytest.mark.parametrize("law", ["greedy", "T=1", "top_k=3", "top_p=0.7", "cold and penalised"])
def test_large_logits_round_by_more(law):
    """The bound grows with them: an output head 300 times as large."""
    model = near_duplicates(size=3e-7)
    with torch.no_grad():
        model.lm_head.weight.mul_(300)
    params = (EDGES | LAWS)[law]
    expected, _ = run(model, params, slots=1)
    for drafter, slots, gammas in (
        (None, 64, (0,)),
        (OracleDrafter(expected), 64, (7, 2)),
        (RandomDrafter(), 2, (3,)),
    ):
        got, _ = run(model, params, drafter, slots, gammas)
        assert_same(got, expected, 1e-2)
