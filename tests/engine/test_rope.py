"""Rope that depends on the longest row of a pass: supported on either side of its switch, refused across it."""

import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter, RandomDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.target import Target
from spec_rollout.records import SamplingParams
from tests.tiny import Scripted, assert_same, make_policy, reference

SWITCH = 16
GREEDY = SamplingParams(max_new_tokens=6, temperature=0)
PHI = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 3.0, 2.0, 8.0],
        "original_max_position_embeddings": SWITCH,
    },
    "original_max_position_embeddings": SWITCH,
}


def phi3(name: str = "phi3"):
    return make_policy(name, **PHI)


@pytest.mark.parametrize(
    "prompts", [[[1, 2, 3], [*range(20)]], [[1, 2, 3], [4] * 11], [[5] * 17], [[5] * 16], [[5] * 12]]
)
def test_rows_that_could_reach_the_switch_are_refused(prompts):
    model = phi3()
    with pytest.raises(ValueError, match="longrope.*beyond 16 tokens.*max_new_tokens within 16 together, or sample"):
        RolloutEngine(model, SpecConfig(num_speculative_tokens=0)).generate(prompts, GREEDY)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(max_new_tokens=6)])
@pytest.mark.parametrize(
    "prompts",
    [[[1, 2, 3], [7], [9] * 10, [1, 2, 3]], [[8] * 18, [*range(30)], [3] * 21, [8] * 18]],
    ids=["below", "beyond"],
)
def test_rows_on_one_side_are_those_of_a_whole_forward(prompts, params):
    """Guesses do not switch it either: they reach past the sixteenth token."""
    model = phi3()
    expected = reference(model, prompts, params)
    for drafter, slots, gammas in ((OracleDrafter(expected), 64, (7, 0, 5)), (RandomDrafter(), 2, (6, 3))):
        engine = RolloutEngine(model, SpecConfig(max_slots=slots), drafter=drafter, controller=Scripted(*gammas))
        assert_same(engine.generate(prompts, params), expected)
    assert_same(RolloutEngine(model, SpecConfig(num_speculative_tokens=0)).generate(prompts, params), expected)


def test_both_sides_by_one_engine():
    model = phi3()
    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=4), drafter=RandomDrafter())
    for prompts in ([[1, 2, 3]], [[8] * 18], [[1, 2, 3]]):
        assert_same(engine.generate(prompts, GREEDY), reference(model, prompts, GREEDY))


def test_the_switch_matters():
    """Control: the two sets of factors are told apart by the tokens."""
    model = phi3()
    with torch.no_grad():
        alone = model(torch.tensor([[1, 2, 3]]), use_cache=False).logits[0, :3]
        beside = model(torch.tensor([[1, 2, 3, *range(20)]]), use_cache=False).logits[0, :3]
    assert float((alone - beside).abs().max()) > 0.1


@pytest.mark.parametrize(("name", "switches"), [("phi3", (SWITCH,)), ("llama", ()), ("gemma3_text", ())])
def test_which_policies_have_one(name, switches):
    assert Target(make_policy(name, **(PHI if name == "phi3" else {}))).switches == switches
