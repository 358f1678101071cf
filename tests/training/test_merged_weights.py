"""What vLLM is given of a policy with adapters: W + s·B·A in float32, then cast; and the policy stays as it was."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3MoeConfig

from spec_rollout.training.merged_weights import merged_weights
from spec_rollout.training.vllm import SpeculativeVLLMGeneration

SMALL = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2)
EXPERTS = Qwen3MoeConfig(
    **SMALL, intermediate_size=48, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16, head_dim=8,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4)
ATTENTION = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
ADAPTERS = {
    "lora": (LLAMA, LoraConfig(**ATTENTION)),
    "rslora": (LLAMA, LoraConfig(**ATTENTION, use_rslora=True)),
    "dora": (LLAMA, LoraConfig(**ATTENTION, use_dora=True)),
    "transposed": (GPT2, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)),
    "embedding and head": (LLAMA, LoraConfig(r=4, target_modules=["embed_tokens", "o_proj"])),
    "experts": (EXPERTS, LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])),
    "saved head": (LLAMA, LoraConfig(**ATTENTION, modules_to_save=["lm_head"])),
    "loha": (LLAMA, LoHaConfig(**ATTENTION)),
}


def adapted(name: str, dtype: torch.dtype):
    config, adapter = ADAPTERS[name]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).to(dtype)
    policy = get_peft_model(base, copy.deepcopy(adapter))
    with torch.no_grad():
        for weight_name, weight in policy.named_parameters():
            if policy.prefix in weight_name and "magnitude" not in weight_name:
                weight.normal_(std=0.3)
    return policy


def bits(policy) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in policy.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_hundred_pushes_of_lora(dtype):
    policy = adapted("lora", dtype)
    before = bits(policy)
    for _ in range(100):
        pushed = dict(merged_weights(policy))
    after = bits(policy)
    assert all(torch.equal(before[name], weight) for name, weight in after.items())
    layers = [layer for layer in policy.modules() if hasattr(layer, "lora_A")]
    assert not any(layer.merged for layer in layers) and len(layers) == 4
    for number, block in enumerate(policy.get_base_model().model.layers):
        for name in ("q_proj", "v_proj"):
            layer = getattr(block.self_attn, name)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            exact = layer.base_layer.weight.float() + layer.scaling["default"] * (b.float() @ a.float())
            assert torch.equal(pushed[f"model.layers.{number}.self_attn.{name}.weight"], exact.to(dtype))


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_is_merged_as_peft_merges_a_copy(name):
    policy = adapted(name, torch.bfloat16)
    before = bits(policy)
    pushed = dict(merged_weights(policy))
    assert all(torch.equal(before[key], weight) for key, weight in bits(policy).items())
    whole = copy.deepcopy(policy).float().merge_and_unload()
    expected = dict(whole.named_parameters())
    named = {key.replace("modules_to_save.default.", ""): weight for key, weight in pushed.items()}
    assert named.keys() == expected.keys()
    for key, weight in expected.items():
        assert named[key].dtype == torch.bfloat16
        torch.testing.assert_close(named[key], weight.to(torch.bfloat16), rtol=0.008, atol=1e-3, msg=key)
    changed = [key for key in named if not torch.equal(named[key], _base(policy, key))]
    assert changed


def _base(policy, key: str) -> torch.Tensor:
    plain = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace("original_module.", ""): weight
        for name, weight in policy.named_parameters()
        if "modules_to_save" not in name
    }
    return plain[key]


def test_the_names_are_those_of_trls_push():
    """What TRL's own walk through the weights would call them."""
    policy = adapted("saved head", torch.float32)
    sender = object.__new__(SpeculativeVLLMGeneration)
    sender.model = policy
    sender._dist = SimpleNamespace(gather_params=lambda weights: torch.no_grad(), is_fsdp=False)
    ours = {name: weight.clone() for name, weight in sender.policy()}
    theirs = {name: weight.clone() for name, weight in sender._iter_named_params()}
    assert list(ours) == list(theirs) and "lm_head.weight" in ours
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight)


def test_a_quantised_layer_is_refused():
    policy = adapted("lora", torch.float32)
    layer = policy.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    layer.weight = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj is quantised \(torch.uint8\).*'embedded'"):
        list(merged_weights(policy))
