"""A policy whose logits are no distribution is named at once, and leaves nothing behind."""

import copy
import itertools

import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.records import RolloutMemoryError, SamplingParams
from tests.tiny import PROMPTS, VOCAB, Scripted, assert_same, make_policy, policy, reference

pytestmark = pytest.mark.any_device

PARAMS = SamplingParams(max_new_tokens=12)
BROKEN = (
    r"LlamaForCausalLM gave no distribution in decoding step \d+, after \d+ tokens of prompt \d+: its logits are NaN"
)


def break_weights(model) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[0, 0] = torch.nan


@pytest.mark.parametrize(
    "params", [PARAMS, SamplingParams(temperature=0, max_new_tokens=12), SamplingParams(max_new_tokens=12, top_k=5)]
)
@pytest.mark.parametrize("verification", ["coupled", "rejection"])
def test_it_is_raised_and_the_next_rollout_is_clean(params, verification):
    """The cache that held NaN is used again for fewer tokens than it held."""
    model = make_policy("llama")
    good = copy.deepcopy(model.state_dict())
    expected = reference(model, PROMPTS, params)
    config = SpecConfig(num_speculative_tokens=2, verification=verification)
    engine = RolloutEngine(model, config, drafter=OracleDrafter(expected))
    first = engine.generate(PROMPTS, params)
    break_weights(model)
    with pytest.raises(FloatingPointError, match=BROKEN):
        engine.generate([[5] * 29] * 7, params)
    model.load_state_dict(good)
    assert_same(engine.generate(PROMPTS, params), first)
    assert verification == "rejection" or [c.token_ids for c in first] == [c.token_ids for c in expected]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_from_the_start(value):
    model = make_policy("llama")
    model.lm_head.register_forward_hook(lambda _, __, logits: torch.full_like(logits, value))
    with pytest.raises(FloatingPointError, match="LlamaForCausalLM gave no distribution .* before the rollout"):
        RolloutEngine(model, SpecConfig(num_speculative_tokens=0)).generate(PROMPTS, PARAMS)


def test_the_step_is_named():
    """It breaks after five decoding steps, for the row that is longest."""
    model = make_policy("llama")
    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=0))
    engine.generate(PROMPTS, PARAMS)

    def breaks(_, args, kwargs):
        if 17 in kwargs["position_ids"][3:4]:
            break_weights(model)

    model.register_forward_pre_hook(breaks, with_kwargs=True)
    prompts = [[1], [2], [3], [*range(7, 19)]]
    with pytest.raises(FloatingPointError, match="in decoding step 7, after 6 tokens of prompt"):
        engine.generate(prompts, PARAMS)


def test_a_guess_that_leads_to_nan_is_forgotten():
    """One token is broken and is guessed, never drawn: its NaN must not weigh on what follows, masked as it is."""
    model = make_policy("llama")
    with torch.no_grad():
        model.lm_head.weight[VOCAB - 1] = 0
    model.lm_head.register_forward_hook(lambda _, __, z: z.index_fill(-1, torch.tensor([VOCAB - 1]), -torch.inf))
    expected = reference(model, PROMPTS, PARAMS)
    with torch.no_grad():
        model.model.embed_tokens.weight[VOCAB - 1] = torch.nan
    drafter = OracleDrafter(expected)
    honest, turn = drafter.propose, itertools.cycle([False, True])
    drafter.propose = lambda *args: honest(*args).index_fill(1, torch.arange(next(turn)), VOCAB - 1)
    engine = RolloutEngine(model, SpecConfig(max_slots=3), drafter=drafter, controller=Scripted(3, 2))
    engine.target._probe = lambda configs, own: own  # its tokens are of all kinds
    assert_same(engine.generate(PROMPTS, PARAMS), expected)
    assert {step.gamma for step in engine.stats.steps} == {3, 0}
    assert engine.stats.mean_acceptance_length > 3


def test_a_pad_token_that_leads_to_nan_is_never_read():
    """The rows of a prefill are padded, and a pad token's embedding may hold anything."""
    model = make_policy("llama")
    model.lm_head.register_forward_hook(lambda _, __, z: z.index_fill(-1, torch.tensor([0]), -torch.inf))
    expected = reference(model, PROMPTS, PARAMS)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = torch.nan
    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=0))
    engine.target._probe = lambda configs, own: own
    assert_same(engine.generate(PROMPTS, PARAMS), expected)


@pytest.mark.parametrize("failing", ["keys", "values"])
def test_out_of_memory_in_the_cache_can_be_tried_again(failing, monkeypatch):
    """What was made before is given back: a second try with fewer slots asks for its own size alone."""
    expected = reference(policy("llama"), PROMPTS, PARAMS)
    engine = RolloutEngine(policy("llama"), SpecConfig(num_speculative_tokens=0))
    with engine.target.rollout():
        assert engine.target.cache_bytes  # is probed and weighed
    made, honest = [], torch.Tensor.new_zeros

    def runs_out(tensor, *size, **options):
        if len(size) == 4:
            made.append(size)
            if len(made) == (1 if failing == "keys" else 2):
                raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(tensor, *size, **options)

    monkeypatch.setattr(torch.Tensor, "new_zeros", runs_out)
    with pytest.raises(RolloutMemoryError, match="Lower max_cache_gib .*CUDA out of memory"):
        engine.generate(PROMPTS, PARAMS)
    assert engine.cache.keys == engine.cache.values == [] and engine.cache.slots == 0
    engine.config.max_slots = 2
    assert_same(engine.generate(PROMPTS, PARAMS), expected)
    assert {slots for slots, *_ in made[2:]} <= {2}


def test_keys_without_values_are_never_left(monkeypatch):
    cache = SlotCache()
    cache.allocate(2, 8)
    states = torch.ones(1, 1, 1, 2)
    window = cache.window(0, torch.tensor([[0]]), 1)
    honest = window._make
    made = iter([honest, None])
    monkeypatch.setattr(window, "_make", lambda states: next(made)(states))
    with pytest.raises(TypeError):
        window.update(states, states, 0)
    assert len(cache.keys) == len(cache.values) == 0
