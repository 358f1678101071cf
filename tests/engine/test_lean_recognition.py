"""Which policies take the lean pass, and which go through their own forward."""

from __future__ import annotations

import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.lean import attention, lean_pass
from spec_rollout.engine.lean.recognition import family_of
from spec_rollout.engine.masks import causal_mask
from spec_rollout.engine.target import Target
from tests.engine.test_lean import PARAMS, rough
from tests.tiny import PROMPTS, VOCAB, assert_same, make_policy, reference


def path_of(model, **engine_options) -> str:
    policy = Target(model, **engine_options)
    with policy.rollout():
        return policy.path


def hooked(model):
    model.model.layers[0].mlp.register_forward_hook(lambda *given: None)


def wrapped(model):
    model.forward = type(model).forward.__get__(model)


def other_mlp(model):
    model.model.layers[1].mlp = torch.nn.Sequential(model.model.layers[1].mlp)


def float32_head(model):
    model.bfloat16().lm_head.float()


def one_weight_more(model):
    model.model.layers[1].register_parameter("gate", torch.nn.Parameter(torch.zeros(3)))


@pytest.mark.parametrize("change", [hooked, wrapped, other_mlp, float32_head, one_weight_more])
def test_a_changed_policy_goes_through_its_own_forward(change):
    model = rough("llama")
    assert path_of(model) == "lean"
    change(model)
    assert family_of(model) is None
    if change not in (other_mlp, float32_head):  # what their own forward cannot compute either
        assert path_of(model) == "transformers"


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("gpt2", {}),
        ("mixtral", {}),
        ("cohere2", {}),
        ("gemma2", {"attn_logit_softcapping": 50.0}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    ],
)
def test_what_it_does_not_know_it_leaves_alone(name, overrides):
    assert path_of(make_policy(name, **overrides)) == "transformers"


def test_under_autocast_the_policys_own_forward_runs():
    model = rough("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert path_of(model) == "transformers"
    assert path_of(model) == "lean"


def test_a_pass_that_is_not_the_policys_is_found_and_said(monkeypatch):
    monkeypatch.setattr(lean_pass, "_add", lambda x, projection, inner, *rest: x + 1.01 * projection(inner))
    with pytest.warns(RuntimeWarning, match="differs from LlamaForCausalLM's own forward"):
        assert path_of(rough("llama")) == "transformers"


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters(kind):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(rough("qwen2"), LoraConfig(r=4, target_modules="all-linear", use_dora=kind == "dora"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    assert path_of(model) == "lean"
    expected = reference(model, PROMPTS, PARAMS)
    with model.disable_adapter():
        assert expected != reference(model, PROMPTS, PARAMS)
    assert_same(RolloutEngine(model, SpecConfig(max_slots=3)).generate(PROMPTS, PARAMS), expected)


def test_a_resized_vocabulary():
    model = rough("llama")
    model.resize_token_embeddings(VOCAB + 14)
    assert path_of(model) == "lean"
    got = RolloutEngine(model).generate(PROMPTS, PARAMS)
    assert_same(got, reference(model, PROMPTS, PARAMS))


def test_a_policy_of_nans_is_judged_again():
    model = rough("llama")
    policy, weight = Target(model), model.model.layers[0].mlp.down_proj.weight
    kept = weight.detach().clone()
    with policy.rollout():
        assert policy.path == "lean"
    choice = policy._choice
    choice._proven.clear()
    weight.data.fill_(float("nan"))
    with policy.rollout():
        assert policy.path == "transformers"
    weight.data.copy_(kept)
    with policy.rollout():
        assert policy.path == "lean"


def test_the_proof_reaches_beyond_wide_windows(monkeypatch):
    """Windows wider than what is read in the proof are narrowed for it."""
    monkeypatch.setattr(attention, "causal_mask", lambda positions, extent, window: causal_mask(positions, extent))
    with pytest.warns(RuntimeWarning, match="differs from MistralForCausalLM's own forward"):
        assert path_of(make_policy("mistral", sliding_window=90)) == "transformers"
