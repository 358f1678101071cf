"""Token ids are those of plain decoding, whatever the architecture, the law, the drafter, γ and the batch."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter, RandomDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import Completion, SamplingParams
from tests.tiny import PROMPTS, VOCAB, Scripted, assert_same, cut, make_policy, policy, reference
from tests.tiny_configs import ARCHITECTURES

pytestmark = pytest.mark.any_device

LAWS = {
    "greedy": SamplingParams(temperature=0),
    "T=1": SamplingParams(),
    "filtered": SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02),
    "greedy, penalty": SamplingParams(temperature=0, repetition_penalty=1.4),
    "T=1.2, penalty": SamplingParams(temperature=1.2, repetition_penalty=1.4),
    "all": SamplingParams(temperature=0.7, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=0.8),
}
GAMMAS = (3, 0, 7, 1, 5, 2, 0, 0, 6, 4)


@cache
def drawn(name: str, law: str = "T=1", size: int = 20) -> list[Completion]:
    """Completions of PROMPTS without an EOS, by the reference."""
    return reference(policy(name), PROMPTS, replace(LAWS[law], max_new_tokens=size))


def two_eos(completions: list[Completion]) -> tuple[int, int]:
    """Two token ids that end a sibling early and the long prompt late, each inside a step's guesses."""
    return completions[0].token_ids[5], completions[3].token_ids[13]


def plain(model, params, **options) -> list[Completion]:
    return RolloutEngine(model, SpecConfig(num_speculative_tokens=0)).generate(PROMPTS, params, **options)


def passes(size: int, gammas) -> int:
    """Verify passes that a perfect draft needs for `size` tokens when the passes guess `gammas`."""
    done = count = 0
    while done < size:
        done += next(gammas) + 1
        count += 1
    return count


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name):
    model = policy(name)
    eos = two_eos(drawn(name))
    expected = cut(drawn(name), eos)
    params = SamplingParams(max_new_tokens=20, eos_token_ids=eos)
    assert sum(c.finish_reason == "eos" for c in expected) >= 2
    assert_same(plain(model, params), expected)

    # γ changes every step; every guess comes true
    engine = RolloutEngine(model, drafter=OracleDrafter(expected), controller=Scripted(*GAMMAS))
    got = engine.generate(PROMPTS, params)
    assert_same(got, expected)
    assert [c.num_steps for c in got] == [passes(len(c.token_ids), Scripted(*GAMMAS).gammas) for c in expected]
    assert engine.stats.mean_acceptance_length > 2

    # three slots for seven prompts; none comes true
    fewer = SpecConfig(num_speculative_tokens=4, max_slots=3)
    engine = RolloutEngine(model, fewer, drafter=OracleDrafter(expected, shift=1))
    got = engine.generate(PROMPTS, params)
    assert_same(got, expected)
    assert [c.num_steps for c in got] == [len(c.token_ids) for c in expected]
    assert engine.stats.drafted > 0 and engine.stats.accepted == 0


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_law(name, law):
    model, expected = policy(name), drawn(name, law)
    params = replace(LAWS[law], max_new_tokens=20)
    assert_same(plain(model, params), expected)
    half_right = [replace(c, token_ids=[t if i % 3 else t + 1 for i, t in enumerate(c.token_ids)]) for c in expected]
    for drafter, gammas in (
        (OracleDrafter(expected), (7, 0, 2)),
        (OracleDrafter(half_right), GAMMAS),
        (RandomDrafter(), (1, 6)),
    ):
        engine = RolloutEngine(model, SpecConfig(max_slots=4), drafter=drafter, controller=Scripted(*gammas))
        assert_same(engine.generate(PROMPTS, params), expected)
        assert engine.stats.drafted > 0
        assert engine.stats.mean_acceptance_length > (1.5 if isinstance(drafter, OracleDrafter) else 1 - 1e-9)


@pytest.mark.parametrize("slots", [1, 2, 64])
@pytest.mark.parametrize("gamma", range(1, 8))
def test_oracle_gives_exactly_gamma_plus_one(gamma, slots):
    expected = drawn("llama")
    engine = RolloutEngine(
        policy("llama"),
        SpecConfig(num_speculative_tokens=gamma, max_slots=slots),
        drafter=OracleDrafter(expected),
    )
    got = engine.generate(PROMPTS, SamplingParams(max_new_tokens=20))
    assert_same(got, expected)
    assert [c.num_steps for c in got] == [math.ceil(20 / (gamma + 1))] * len(PROMPTS)
    whole = [step for step in engine.stats.steps if step.emitted == step.rows * (gamma + 1)]
    assert len(whole) >= len(engine.stats.steps) * (20 // (gamma + 1)) / math.ceil(20 / (gamma + 1))
    assert all(step.accepted == [step.rows] * gamma for step in whole)


@pytest.mark.parametrize("slots", [2, 64])
@pytest.mark.parametrize("drafter", [RandomDrafter(3), "oracle", "wrong"])
def test_counts_add_up(drafter, slots):
    """What the completions count and what the steps count are the same passes, guesses and tokens."""
    expected = cut(drawn("llama"), two_eos(drawn("llama")))
    if isinstance(drafter, str):
        drafter = OracleDrafter(expected, shift=drafter == "wrong")
    controller = Scripted(*GAMMAS)
    engine = RolloutEngine(policy("llama"), SpecConfig(max_slots=slots), drafter=drafter, controller=controller)
    got = engine.generate(PROMPTS, SamplingParams(max_new_tokens=20, eos_token_ids=two_eos(drawn("llama"))))
    assert controller.steps == engine.stats.steps
    assert sum(s.rows for s in controller.steps) == sum(c.num_steps for c in got)
    assert engine.stats.emitted == sum(len(c.token_ids) for c in got)
    assert engine.stats.drafted == sum(c.num_drafted for c in got)
    assert engine.stats.accepted == sum(c.num_accepted for c in got)
    assert max(s.rows for s in controller.steps) <= slots
    assert all(s.accepted == sorted(s.accepted, reverse=True) and len(s.accepted) == s.gamma for s in controller.steps)
    assert all(s.seconds >= 0 for s in controller.steps)


def test_reproducible_and_named_by_seed_and_entry():
    engine = RolloutEngine(policy("llama"), SpecConfig(num_speculative_tokens=0))
    params = SamplingParams(max_new_tokens=12)
    first = engine.generate(PROMPTS, params, seed=(3, 1))
    assert_same(engine.generate(PROMPTS, params, seed=(3, 1)), first, logprob_error=0)
    assert_same(engine.generate(PROMPTS[:4], params, seed=(3, 1)), first[:4])  # whoever comes after it
    for seed in ((3, 2), (1, 3), (4, 1), (3, 1, 0), (3,)):
        other = engine.generate(PROMPTS, params, seed=seed)
        assert all(a.token_ids != b.token_ids for a, b in zip(other, first, strict=True))
    siblings = [tuple(first[i].token_ids) for i in (0, 1, 6)]
    assert len(set(siblings)) == 3  # equal prompts, noise of their own


def test_one_engine_for_many_rollouts():
    """The cache is kept between calls and grows when it must; what an earlier call left there does not matter."""
    model = policy("gemma3_text")
    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=3, max_slots=4), drafter=RandomDrafter())
    for prompts, size in ((PROMPTS, 20), ([[4, 5]], 3), ([[*range(60)], [9]], 30), (PROMPTS, 8), ([], 5)):
        params = SamplingParams(max_new_tokens=size)
        assert_same(engine.generate(prompts, params), reference(model, prompts, params))


def test_the_cache_follows_the_policy_to_another_dtype():
    model = make_policy("llama", torch.bfloat16)
    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=0))
    engine.generate(PROMPTS, SamplingParams(max_new_tokens=4))
    model.float()
    params = SamplingParams(max_new_tokens=12)
    assert_same(engine.generate(PROMPTS, params), reference(model, PROMPTS, params))


def test_weights_may_change_between_rollouts():
    model = make_policy("llama")
    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=2), drafter=RandomDrafter())
    params = SamplingParams(max_new_tokens=10)
    before = engine.generate(PROMPTS, params)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    after = engine.generate(PROMPTS, params)
    assert_same(after, reference(model, PROMPTS, params))
    assert [c.token_ids for c in after] != [c.token_ids for c in before]


def test_the_whole_context_can_be_used():
    """Guesses beyond the last position of the context are harmless, also for learned position embeddings."""
    for name in ("gpt2", "opt", "llama"):
        model = make_policy(name, max_position_embeddings=32)
        prompts, limits = [[1, 2, 3], [*range(20)], [4] * 31], [29, 12, 1]
        params = SamplingParams(max_new_tokens=29)
        expected = reference(model, prompts, params, max_new_tokens=limits)
        for drafter in (OracleDrafter(expected), OracleDrafter(expected, shift=1)):
            engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=7), drafter=drafter)
            assert_same(engine.generate(prompts, params, max_new_tokens=limits), expected)
            assert engine.stats.drafted > 0


def test_prefill_in_several_passes(monkeypatch):
    """Prompts that do not fit one prefill pass are prefilled in more, a longer one alone."""
    monkeypatch.setattr("spec_rollout.engine.prefill.PREFILL_TOKENS", 8)
    prompts = [[1, 2, 3], [4, 5], [*range(30)], [6], [7], [8, 9, 10, 11, 12], [*range(30)], [1, 2, 3]]
    params = SamplingParams(max_new_tokens=10)
    expected = reference(policy("mistral"), prompts, params)
    engine = RolloutEngine(
        policy("mistral"), SpecConfig(num_speculative_tokens=3, max_slots=6), drafter=OracleDrafter(expected)
    )
    assert_same(engine.generate(prompts, params), expected)
    assert engine.stats.mean_acceptance_length > 3


def test_vocabulary_edges():
    """The first and the last token id are ordinary tokens: in prompts, as guesses and as EOS."""
    model = policy("llama")
    prompts = [[0], [VOCAB - 1], [0, VOCAB - 1]] * 2
    params = SamplingParams(max_new_tokens=30, eos_token_ids=(0, VOCAB - 1))
    expected = reference(model, prompts, params)
    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=4), drafter=OracleDrafter(expected))
    assert_same(engine.generate(prompts, params), expected)
