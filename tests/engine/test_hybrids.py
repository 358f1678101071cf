"""Policies with recurrent layers: token ids are those of plain decoding, at any number of guesses."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.references import OracleDrafter, RandomDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.support import cache_argument
from spec_rollout.records import Completion, SamplingParams
from tests.tiny import PROMPTS, Scripted, assert_same, cut, policy, reference
from tests.tiny_configs import HYBRIDS, RELATIVES

GAMMAS = (3, 0, 7, 1, 5, 2, 0, 0, 6, 4)
ERROR = 1e-3
"""Of log-probs: the same tokens in passes of other shapes, where a state carries the rounding on."""
LAWS = {"T=1": SamplingParams(), "greedy": SamplingParams(temperature=0)}


@cache
def drawn(name: str, law: str = "T=1", size: int = 20) -> list[Completion]:
    return reference(policy(name), PROMPTS, replace(LAWS[law], max_new_tokens=size))


def mixed(name: str, law: str = "T=1") -> OracleDrafter:
    """Guesses that are right two times in three."""
    guesses = [replace(c, token_ids=[t + (i % 3 == 2) for i, t in enumerate(c.token_ids)]) for c in drawn(name, law)]
    return OracleDrafter(guesses)


def eagle(model) -> EagleDrafter:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        drafter = EagleDrafter(EagleHead(HeadConfig.for_target(model.config)), PolicyView(model))
    drafter.ready = True
    return drafter


def test_the_tiny_policies_could_fail():
    """Their padding has an embedding and their states last: a fresh model's hide what padding and stale states do."""
    for name in HYBRIDS:
        model = policy(name)
        assert model.get_input_embeddings().weight[0].abs().max() > 0.1
        decays = [p for key, p in model.named_parameters() if key.endswith("A_log")]
        assert all(decay.exp().max() < 0.4 for decay in decays)


@pytest.mark.parametrize(
    ("name", "law"), [*((name, "T=1") for name in HYBRIDS), ("qwen3_5_text", "greedy"), ("bamba", "greedy")]
)
def test_token_ids(name, law):
    model, expected = policy(name), drawn(name, law)
    params = replace(LAWS[law], max_new_tokens=20)
    plain = RolloutEngine(model, SpecConfig(num_speculative_tokens=0, max_slots=4))
    assert_same(plain.generate(PROMPTS, params), expected, ERROR)
    for drafter, gammas, slots in (
        (OracleDrafter(expected), GAMMAS, 64),
        (mixed(name, law), GAMMAS, 4),
        (OracleDrafter(expected, shift=1), (4, 0, 2), 4),
        (RandomDrafter(), (1, 6, 0), 5),
        (eagle(model), GAMMAS, 3),
    ):
        engine = RolloutEngine(model, SpecConfig(max_slots=slots), drafter=drafter, controller=Scripted(*gammas))
        assert_same(engine.generate(PROMPTS, params), expected, ERROR)
        assert engine.stats.drafted > 0 and engine.stats.drafter_failures == 0
        if slots == 64:
            assert engine.stats.mean_acceptance_length > 3


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives(name):
    """Models that share a recurrence with those above."""
    if name == "mamba2" and cache_argument(policy(name)) != "cache":
        pytest.skip("its cache is counted by the model before transformers 5.24")
    for drafter, slots in ((mixed(name), 3), (OracleDrafter(drawn(name), shift=1), 64)):
        engine = RolloutEngine(
            policy(name), SpecConfig(max_slots=slots), drafter=drafter, controller=Scripted(*GAMMAS)
        )
        assert_same(engine.generate(PROMPTS, SamplingParams(max_new_tokens=20)), drawn(name), ERROR)


@pytest.mark.parametrize("gamma", range(8))
def test_every_gamma_and_an_eos_inside_the_guesses(gamma):
    for name in ("qwen3_5_text", "lfm2", "bamba"):
        eos = (drawn(name)[3].token_ids[13], drawn(name)[0].token_ids[5])
        expected = cut(drawn(name), eos)
        for drafter, slots in ((OracleDrafter(drawn(name)), 3), (mixed(name), 2)):
            engine = RolloutEngine(
                policy(name), SpecConfig(num_speculative_tokens=gamma, max_slots=slots), drafter=drafter
            )
            got = engine.generate(PROMPTS, SamplingParams(max_new_tokens=20, eos_token_ids=eos))
            assert_same(got, expected, ERROR)


@pytest.mark.parametrize("name", HYBRIDS)
def test_long_rows(name):
    """Prompts and completions longer than a chunk of the recurrence, in prefills of one and of several rows."""
    model = policy(name)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(97, (n,), generator=generator).tolist() for n in (70, 3, 66, 1, 64)]
    params = SamplingParams(max_new_tokens=24)
    expected = reference(model, prompts, params)
    for slots in (1, 5):
        engine = RolloutEngine(
            model, SpecConfig(max_slots=slots), drafter=OracleDrafter(expected), controller=Scripted(4, 0, 2)
        )
        assert_same(engine.generate(prompts, params), expected, ERROR)
        assert engine.stats.mean_acceptance_length > 2


def test_one_engine_for_many_rollouts():
    """What an earlier rollout left in the slots is not the state of a new row."""
    for name in ("qwen3_5_text", "lfm2", "bamba"):
        engine = RolloutEngine(
            policy(name), SpecConfig(num_speculative_tokens=3, max_slots=4), drafter=RandomDrafter()
        )
        for prompts, size in ((PROMPTS, 12), ([[4], [6]], 3), ([[*range(60)], [9]], 12), (PROMPTS, 8)):
            params = SamplingParams(max_new_tokens=size)
            assert_same(engine.generate(prompts, params), reference(policy(name), prompts, params), ERROR)


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "granitemoehybrid"])
def test_prefill_in_several_passes(name, monkeypatch):
    monkeypatch.setattr("spec_rollout.engine.prefill.PREFILL_TOKENS", 8)
    for slots in (3, 64):
        engine = RolloutEngine(
            policy(name), SpecConfig(max_slots=slots), drafter=mixed(name), controller=Scripted(2, 0)
        )
        assert_same(engine.generate(PROMPTS, SamplingParams(max_new_tokens=20)), drawn(name), ERROR)


def test_filters_penalties_and_stops_take_part():
    params = SamplingParams(temperature=0.8, top_k=30, top_p=0.95, repetition_penalty=1.3, max_new_tokens=20)
    for name in ("qwen3_5_text", "falcon_h1"):
        expected = reference(policy(name), PROMPTS, params)
        engine = RolloutEngine(
            policy(name), SpecConfig(max_slots=4), drafter=OracleDrafter(expected), controller=Scripted(*GAMMAS)
        )
        assert_same(engine.generate(PROMPTS, params), expected, ERROR)
        assert engine.stats.mean_acceptance_length > 2
