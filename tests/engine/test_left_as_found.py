"""A rollout leaves the policy and torch's random stream as it found them."""

import copy

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter, RandomDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import SamplingParams
from tests.tiny import PROMPTS, assert_same, make_policy, policy, reference

PARAMS = SamplingParams(max_new_tokens=10)
OWN = "one_of_its_own"
AttentionInterface.register(OWN, sdpa_attention_forward)
AttentionMaskInterface.register(OWN, sdpa_mask)


def snapshot(model) -> dict:
    return {
        "training": [module.training for module in model.modules()],
        "config": model.config.to_dict(),
        "attention": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        "generation": model.generation_config.to_dict(),
        "grad": [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()],
        "checkpointing": [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
    }


def fresh(name: str, **options):
    """A model in training mode, with the hooks that transformers puts on it when hidden states are first asked for."""
    model = make_policy(name, **options)
    model(input_ids=torch.tensor([[1]]), output_hidden_states=True)
    return model.train()


def assert_equal(a, b) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *((name, "sdpa") for name in ("llama", "gemma3_text", "gpt2")),
        *((name, "eager") for name in ("llama", "gemma3_text", "gpt2", "gpt_oss")),
        *((name, OWN) for name in ("llama", "gemma3_text", "gpt2")),
    ],
)
def test_model(name, attention):
    """Flags, attention, gradients, weights and config are the same after as before, whatever they were."""
    model = fresh(name)
    model.config._attn_implementation = attention
    list(model.modules())[-1].eval()  # one module frozen by hand
    first, second, *_ = model.parameters()
    first.grad, second.requires_grad = torch.ones_like(first), False
    before = copy.deepcopy(snapshot(model))
    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=3), drafter=RandomDrafter())
    engine.generate(PROMPTS, PARAMS)
    assert_equal(snapshot(model), before)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("where", ["probe", "drafter", "policy"])
def test_model_after_an_error(where):
    model = fresh("llama")
    model.config._attn_implementation = OWN
    drafter = RandomDrafter()
    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=3), drafter=drafter)
    if where == "policy":
        engine.generate(PROMPTS, PARAMS)
    before = copy.deepcopy(snapshot(model))

    def breaks(*_):
        raise KeyboardInterrupt

    handle = model.lm_head.register_forward_hook(breaks) if where != "drafter" else None
    if where == "drafter":
        drafter.propose = breaks
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, PARAMS)
    if handle:
        handle.remove()
    assert_equal(snapshot(model), before)
    assert torch.is_grad_enabled()


def test_random_stream():
    """The policy's random stream is not touched: what is drawn after a rollout is what would have been drawn."""
    model = make_policy("llama").train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    known = reference(model, PROMPTS, PARAMS)
    for drafter in (RandomDrafter(), OracleDrafter(known)):
        RolloutEngine(model, SpecConfig(num_speculative_tokens=3), drafter=drafter).generate(PROMPTS, PARAMS)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_random_stream_does_not_matter():
    """Completions depend on the seed given alone, and dropout is off while they are drawn."""
    model = make_policy("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    expected = reference(copy.deepcopy(model).eval(), PROMPTS, PARAMS)
    for seed in (1, 2):
        torch.manual_seed(seed)
        engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=3), drafter=OracleDrafter(expected))
        assert_same(engine.generate(PROMPTS, PARAMS), expected)
        assert engine.stats.mean_acceptance_length > 3
    assert model.training


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_gradient_checkpointing(name):
    """It turns the cache off while training; a rollout needs the cache."""
    expected = reference(policy(name), PROMPTS, PARAMS)
    model = fresh(name)
    model.gradient_checkpointing_enable()
    before = copy.deepcopy(snapshot(model))
    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=4), drafter=OracleDrafter(expected))
    assert_same(engine.generate(PROMPTS, PARAMS), expected)
    assert engine.stats.mean_acceptance_length > 3
    assert_equal(snapshot(model), before)
    loss = model(input_ids=torch.tensor([PROMPTS[3]]), labels=torch.tensor([PROMPTS[3]])).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad) or name == "mixtral"


def test_training_goes_on_as_if_nothing_had_been_sampled():
    """An optimiser step between rollouts gives the same weights as without them."""

    def train(sample: bool) -> dict:
        model = make_policy("llama", attention_dropout=0.1).train()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=2), drafter=RandomDrafter())
        torch.manual_seed(0)
        for _ in range(2):
            if sample:
                engine.generate(PROMPTS, PARAMS)
            ids = torch.tensor([PROMPTS[3]])
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()

    assert_equal(train(sample=True), train(sample=False))


def test_results_carry_no_graph_and_no_tensors():
    got = RolloutEngine(make_policy("llama").train(), SpecConfig(num_speculative_tokens=0)).generate(PROMPTS, PARAMS)
    assert all(type(token) is int for c in got for token in c.token_ids)
    assert all(type(logprob) is float for c in got for logprob in c.logprobs)
    assert all(type(x) is int for c in got for x in (c.num_steps, c.num_drafted, c.num_accepted))
