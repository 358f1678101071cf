"""What checkpoints call the tensors of MTP heads: read and given back, with experts either way."""

import pytest
import torch

from spec_rollout.draft.mtp import MtpHead
from spec_rollout.draft.mtp_checkpoint import with_further
from spec_rollout.draft.mtp_names import QWEN, appended, merged, names_in, split
from tests.draft.test_mtp import random_head
from tests.tiny import policy

HEADS = {
    "qwen3_5_text": QWEN,
    "qwen3_5_moe_text": QWEN,
    "qwen3_next": QWEN,
    "glm4_moe": appended(2),
    "deepseek_v3": appended(2),
}
"""Policies whose makers publish an MTP head with them, and what they call its tensors."""
JOINED = {"qwen3_5_text": "mtp.fc.weight", "glm4_moe": "model.layers.2.eh_proj.weight"}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_what_was_read_is_given_back(name, stacked):
    head = random_head(policy(name), HEADS[name]._replace(stacked=stacked))
    given = head.on_disk(torch.float32)
    again = MtpHead.of(policy(name), given, "here")
    assert again.names.prefix == head.names.prefix
    assert "experts" not in str([*given]) or again.names.stacked == stacked == any("gate_up" in n for n in given)
    back = again.on_disk(torch.float32)
    assert given.keys() == back.keys() and all(torch.equal(given[name], back[name]) for name in given)


def test_experts_are_those_of_the_policys_own_layers(tmp_path):
    """transformers splits its stacks of experts when it saves a policy; a head is split in the same way."""
    from safetensors.torch import load_file

    model = policy("glm4_moe")
    model.save_pretrained(tmp_path)
    saved = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if n.startswith("model.layers.1.")}
    head = random_head(model, appended(2))
    head.layers[0].load_state_dict(model.model.layers[1].state_dict())
    given = {n.replace("layers.2.", "layers.1."): t for n, t in head.on_disk(torch.float32).items()}
    assert len(saved) > 20 and saved.keys() <= given.keys()
    assert all(torch.equal(given[name], saved[name]) for name in saved)


def test_a_gap_among_the_experts_is_no_stack():
    whole = {"a.experts.gate_up_proj": torch.randn(3, 4, 2), "a.experts.down_proj": torch.randn(3, 2, 2)}
    apart = split(whole)
    assert len(apart) == 9
    assert all(torch.equal(merged(apart)[name], whole[name]) for name in whole)
    torch.testing.assert_close(apart["a.experts.1.up_proj.weight"], whole["a.experts.gate_up_proj"][1, 2:])
    del apart["a.experts.1.up_proj.weight"]
    assert merged(apart).keys() == apart.keys()
    head = random_head(policy("glm4_moe"), appended(2)).on_disk(torch.float32)
    del head["model.layers.2.mlp.experts.3.up_proj.weight"]
    with pytest.raises(ValueError, match=r"here are not one decoder layer of this policy: .*experts"):
        MtpHead.of(policy("glm4_moe"), head, "here", check=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    given = random_head(policy("qwen3_5_text"), QWEN).on_disk(torch.bfloat16)
    given["mtp.layers.0.mlp.down_proj.weight"][1, 1] = value
    with pytest.raises(ValueError, match="in here hold NaN or infinite numbers: copy them again"):
        MtpHead.of(policy("qwen3_5_text"), given, "here")


def test_a_layer_of_a_longer_policy_is_no_head():
    """Loaded with fewer layers than it has, a policy's next layer has no `eh_proj`."""
    assert names_in(["model.layers.2.mlp.gate.weight", "lm_head.weight"], 2) is None
    assert names_in(["model.layers.2.eh_proj.weight"], 1) is None
    assert names_in(["model.layers.2.eh_proj.weight"], 2) == appended(2)


@pytest.mark.parametrize("name", ["qwen3_5_text", "glm4_moe"])
def test_further_layers_go_back_as_they_were(name):
    own = random_head(policy(name), HEADS[name]).on_disk(torch.float32)
    prefix = {"qwen3_5_text": "mtp.layers.1.", "glm4_moe": "model.layers.3."}[name]
    further = {f"{prefix}mlp.gate.weight": torch.ones(4, 2, dtype=torch.float8_e4m3fn)}
    head = MtpHead.of(policy(name), own | further, "here")
    back = with_further(head, own | further, torch.bfloat16)
    assert back.keys() == own.keys() | further.keys()
    assert back[JOINED[name]].dtype == torch.bfloat16 and all(back[n] is further[n] for n in further)


@pytest.mark.parametrize("change", [{"dtype": torch.float8_e4m3fn}, {"name": "_scale_inv"}])
def test_quantised_heads_are_refused(change):
    tensors = random_head(policy("glm4_moe"), appended(2)).on_disk(torch.float32)
    name = "model.layers.2.self_attn.q_proj.weight"
    tensors[name + change.get("name", "")] = tensors[name].to(change.get("dtype", torch.float32))
    with pytest.raises(ValueError, match=r"here are quantised .*q_proj.* that is not quantised"):
        MtpHead.of(policy("glm4_moe"), tensors, "here")


def test_corrections_of_a_router_stay_in_float32():
    head = random_head(policy("glm4_moe"), appended(2)).bfloat16()
    bias = head.layers[0].mlp.gate.e_score_correction_bias
    assert head.fc.weight.dtype == torch.bfloat16 and bias.dtype == torch.float32
    given = head.on_disk(torch.bfloat16)["model.layers.2.mlp.gate.e_score_correction_bias"]
    assert torch.equal(given, bias) and not torch.equal(bias, bias.bfloat16().float())
