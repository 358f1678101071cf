"""Siblings copy what their prompt's row has read, wherever it sits by then."""

import pytest

from spec_rollout.config import SpecConfig
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import SamplingParams
from tests.tiny import assert_same, policy, reference


@pytest.mark.parametrize("slots", [4, 5, 7])
@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_siblings_of_a_prompt_that_is_read_while_others_leave(name, slots, monkeypatch):
    """A prompt so long that it is read in pieces, between which rows end and those behind them move."""
    monkeypatch.setattr("spec_rollout.engine.prefill.PREFILL_TOKENS", 8)
    prompts = [[1, 2], [3], [4], *[[*range(7, 50)]] * 3, [5]]
    limits, params = [3, 4, 5, 20, 20, 20, 9], SamplingParams(max_new_tokens=20)
    engine = RolloutEngine(policy(name), SpecConfig(num_speculative_tokens=0, max_slots=slots))
    expected = reference(policy(name), prompts, params, max_new_tokens=limits)
    assert_same(engine.generate(prompts, params, max_new_tokens=limits), expected, 1e-3)


def test_siblings_of_an_active_row_that_leaves_meanwhile(monkeypatch):
    """They enter beside a prompt that is read in pieces."""
    monkeypatch.setattr("spec_rollout.engine.prefill.PREFILL_TOKENS", 8)
    short, long = [1, 2, 3, 4, 5], [*range(7, 50)]
    prompts, limits = [short, [9], long, short, short], [4, 2, 20, 20, 20]
    engine = RolloutEngine(policy("llama"), SpecConfig(num_speculative_tokens=0, max_slots=5))
    params = SamplingParams(max_new_tokens=20)
    expected = reference(policy("llama"), prompts, params, max_new_tokens=limits)
    assert_same(engine.generate(prompts, params, max_new_tokens=limits), expected)
    assert engine.stats.prefilled_tokens == len(short) - 1 + len(long) - 1
