"""Where a completion ends: EOS, limits and stop strings, at every place of a guess."""

import math
from dataclasses import replace

import pytest

from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import Completion, SamplingParams
from tests.engine.test_equality import GAMMAS, LAWS, drawn
from tests.tiny import (
    PROMPTS,
    Scripted,
    assert_same,
    cut,
    make_policy,
    policy,
    reference,
    tokenizer,
)

pytestmark = pytest.mark.any_device


@pytest.mark.parametrize("inside", range(8))
def test_eos_at_every_place_of_a_guess(inside):
    """A row ends at its EOS even where the guesses behind it are the right continuation."""
    long = drawn("llama", size=20)
    eos = (long[3].token_ids[inside],)
    expected = cut(long, eos)
    for drafter in (OracleDrafter(long), OracleDrafter(expected)):
        engine = RolloutEngine(policy("llama"), SpecConfig(num_speculative_tokens=7), drafter=drafter)
        got = engine.generate(PROMPTS, SamplingParams(max_new_tokens=20, eos_token_ids=eos))
        assert_same(got, expected)
        assert got[3].finish_reason == "eos" and got[3].num_steps == math.ceil(len(got[3].token_ids) / 8)
    assert engine.stats.mean_acceptance_length > 1


def test_eos_as_the_last_token_allowed():
    """A row that may have no further token and ends with an EOS counts as ended."""
    long = drawn("llama")
    eos = (long[3].token_ids[3],)
    size = long[3].token_ids.index(eos[0]) + 1
    expected = reference(policy("llama"), PROMPTS, SamplingParams(max_new_tokens=size, eos_token_ids=eos))
    assert expected[3].finish_reason == "eos" and len(expected[3].token_ids) == size
    for gamma in (0, 2, 7):
        engine = RolloutEngine(policy("llama"), SpecConfig(num_speculative_tokens=gamma), drafter=OracleDrafter(long))
        assert_same(engine.generate(PROMPTS, SamplingParams(max_new_tokens=size, eos_token_ids=eos)), expected)


def test_pad_and_prompts_hold_the_eos():
    """No mask comes from a pad id, and an EOS in a prompt ends nothing: chat templates put them there."""
    eos = drawn("llama")[0].token_ids[4]
    model = make_policy("llama", pad_token_id=eos, eos_token_id=eos)
    prompts = [[eos, *prompt, eos] for prompt in PROMPTS] + [[eos], [eos, eos]]
    free = reference(model, prompts, SamplingParams(max_new_tokens=20))
    eos_ids = (eos, free[2].token_ids[9])
    expected = cut(free, eos_ids)
    assert sum(c.finish_reason == "eos" for c in expected) >= 2
    engine = RolloutEngine(model, SpecConfig(max_slots=4), drafter=OracleDrafter(free), controller=Scripted(*GAMMAS))
    got = engine.generate(prompts, SamplingParams(max_new_tokens=20, eos_token_ids=eos_ids))
    assert_same(got, expected)
    assert engine.stats.mean_acceptance_length > 1.5


@pytest.mark.parametrize("slots", [2, 64])
@pytest.mark.parametrize("gamma", [0, 1, 5])
def test_max_new_tokens_per_request(gamma, slots):
    limits = [1, 20, 7, 2, 13, 6, 1]
    expected = [
        Completion(c.token_ids[:n], c.logprobs[:n], "length") for c, n in zip(drawn("llama"), limits, strict=True)
    ]
    engine = RolloutEngine(
        policy("llama"),
        SpecConfig(num_speculative_tokens=gamma, max_slots=slots),
        drafter=OracleDrafter(drawn("llama")),
    )
    got = engine.generate(PROMPTS, max_new_tokens=limits)
    assert_same(got, expected)
    assert [c.num_steps for c in got] == [math.ceil(n / (gamma + 1)) for n in limits]


@pytest.mark.parametrize("law", ["greedy", "T=1"])
def test_stop_strings(law):
    """A row ends with the token that completes a stop string in the text of prompt and completion."""
    model = make_policy("llama", std=0.25)
    params = replace(LAWS[law], max_new_tokens=24)
    free = reference(model, PROMPTS, params)
    text = tokenizer().decode
    stop = (text(free[3].token_ids[6:9])[-5:], text(free[0].token_ids[2:5])[-5:], "no such text")
    expected = []
    for prompt, completion in zip(PROMPTS, free, strict=True):
        sizes = (
            n
            for n in range(1, 25)
            for s in stop
            # the match ends inside the n-th token: it is in the text with it and was not there without it
            if s in text([*prompt, *completion.token_ids[:n]])[-len(text(completion.token_ids[n - 1])) - len(s) + 1 :]
        )
        size = next(sizes, None)
        reason = "length" if size is None else "stop"
        expected.append(Completion(completion.token_ids[:size], completion.logprobs[:size], reason))
    assert {c.finish_reason for c in expected} == {"length", "stop"}
    params = replace(params, stop_strings=stop)
    for slots, gammas in ((64, (0,)), (64, GAMMAS), (2, (7,)), (3, (2,))):
        engine = RolloutEngine(
            model,
            SpecConfig(max_slots=slots),
            drafter=OracleDrafter(free),
            controller=Scripted(*gammas),
            tokenizer=tokenizer(),
        )
        assert_same(engine.generate(PROMPTS, params), expected)
        assert gammas == (0,) or engine.stats.mean_acceptance_length > 1.5


def test_eos_comes_before_a_stop_string():
    model, params = make_policy("llama", std=0.25), SamplingParams(max_new_tokens=24)
    free = reference(model, PROMPTS, params)
    token = free[3].token_ids[6]
    stops = replace(params, eos_token_ids=(token,), stop_strings=(tokenizer().decode([token]),))
    config = SpecConfig(num_speculative_tokens=3)
    engine = RolloutEngine(model, config, drafter=OracleDrafter(free), tokenizer=tokenizer())
    got = engine.generate(PROMPTS, stops)
    assert got[3].finish_reason == "eos" and got[3].token_ids[-1] == token
