"""A new head takes what it can of the policy, in the policy's shape, and says what it could not take."""

import pytest
import torch

from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.config import SpecConfig
from spec_rollout.draft.checkpoint import save_head
from spec_rollout.draft.checkpoint_reader import load_head
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.inheritance import MLP, QUERIES, head_config, inherit
from spec_rollout.draft.policy_view import PolicyView, decoder_layers
from spec_rollout.records import SamplingParams
from tests.tiny import PROMPTS, VOCAB, make_policy, policy


def inherited(name, scale=1.0):
    """A head for the policy `name`, what it could not take, and the inputs that it was made with."""
    model = policy(name)
    shape = head_config(model)
    generator = torch.Generator().manual_seed(1)
    features = scale * torch.randn(300, (len(shape.aux_layers) + 1) * shape.hidden_size, generator=generator)
    tokens = torch.randint(VOCAB, (300,), generator=generator)
    head = EagleHead(shape)
    head.fit_scale(features, fresh=True)
    return head, inherit(head, PolicyView(model), features, tokens), features, tokens


def donor(name, head):
    return decoder_layers(policy(name))[head.config.aux_layers[0]]


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_attention_and_mlp_are_the_policys(name):
    head, missing, *_ = inherited(name)
    layer, width = donor(name, head), head.config.hidden_size
    assert not missing and head.config.intermediate_size == policy(name).config.intermediate_size
    first = decoder_layers(policy(name))[0]
    for part in QUERIES:
        weight = getattr(head.midlayer.self_attn, part).weight
        assert torch.equal(weight[:, width:], getattr(layer.self_attn, part).weight)
        assert torch.equal(weight[:, :width], getattr(first.self_attn, part).weight)
    for part in MLP[:2]:
        assert torch.equal(getattr(head.midlayer.mlp, part).weight, getattr(layer.mlp, part).weight)
    torch.testing.assert_close(head.midlayer.hidden_norm.weight, layer.input_layernorm.weight)
    torch.testing.assert_close(head.midlayer.post_attention_layernorm.weight, layer.post_attention_layernorm.weight)


def test_what_the_layer_adds_is_as_large_beside_the_scaled_feature():
    """Features of magnitude 32 are read at 1, so the layer that was made for them has to add a 32nd."""
    head, *_ = inherited("llama", scale=32.0)
    layer = donor("llama", head)
    assert float(head.feature_scale[-1]) == 1 / 32
    assert torch.equal(head.midlayer.self_attn.o_proj.weight, layer.self_attn.o_proj.weight / 32)
    assert torch.equal(head.midlayer.mlp.down_proj.weight, layer.mlp.down_proj.weight / 32)


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "hunyuan_v1_dense"])
@pytest.mark.parametrize("part", [0, 1])
def test_a_norm_that_heads_do_not_have_is_made_up_for(name, part):
    """Queries and keys are as large, on the mean, as behind the policy's norm; without it scores would be of any
    size."""
    head, missing, features, _ = inherited(name)
    layer, width = donor(name, head), head.config.hidden_size
    assert not missing
    projection, norm = (("q_proj", "q_norm"), ("k_proj", "k_norm"))[part]
    if name == "hunyuan_v1_dense":
        norm = ("query_layernorm", "key_layernorm")[part]
    with torch.no_grad():
        x = head.midlayer.hidden_norm(head.fuse(features[:, : head.fc.in_features] * head.feature_scale))
        mine = x @ getattr(head.midlayer.self_attn, projection).weight[:, width:].T
        raw = getattr(layer.self_attn, projection)(x)
        theirs = getattr(layer.self_attn, norm)(raw.view(len(x), -1, head.config.head_dim)).flatten(1)
    torch.testing.assert_close(mine.square().mean(0), theirs.square().mean(0), rtol=1e-3, atol=1e-4)


def test_norms_that_add_one_to_their_weights():
    model = make_policy("gemma2")
    for layer in decoder_layers(model):
        torch.nn.init.normal_(layer.input_layernorm.weight, std=0.2)
    shape = head_config(model)
    head = EagleHead(shape)
    features = torch.randn(50, (len(shape.aux_layers) + 1) * shape.hidden_size)
    inherit(head, PolicyView(model), features, torch.arange(50))
    layer = decoder_layers(model)[shape.aux_layers[0]]
    torch.testing.assert_close(head.midlayer.hidden_norm.weight, 1 + layer.input_layernorm.weight)


@pytest.mark.parametrize(
    ("name", "wanted"), [("gpt2", ["attention", "MLP"]), ("mixtral", ["MLP"]), ("phi3", ["attention", "MLP"])]
)
def test_what_a_policy_does_not_have_stays_random(name, wanted):
    head, missing, *_ = inherited(name)
    assert missing == wanted
    fresh = EagleHead(head.config)
    assert torch.equal(head.midlayer.mlp.up_proj.weight, fresh.midlayer.mlp.up_proj.weight)
    taken = not torch.equal(head.midlayer.self_attn.q_proj.weight, fresh.midlayer.self_attn.q_proj.weight)
    assert taken == ("attention" not in wanted)


def test_a_head_that_begins_at_random_says_so(tmp_path):
    backend = EmbeddedBackend(policy("gpt2"), SpecConfig(num_speculative_tokens=3, draft_overhead=1e9))
    backend.generate(PROMPTS, SamplingParams(max_new_tokens=8))
    with pytest.warns(RuntimeWarning, match="GPT2LMHeadModel has no attention and no MLP"):
        backend.refresh()


def test_a_first_training_begins_with_the_policys_layer():
    """And leaves the policy itself as it is."""
    model = make_policy("llama")
    before = [p.clone() for p in model.parameters()]
    backend = EmbeddedBackend(model, SpecConfig(num_speculative_tokens=3, draft_overhead=1e9))
    backend.generate(PROMPTS * 4, SamplingParams(max_new_tokens=24))
    backend.learner._prepare()
    head = backend.learner.head
    layer = decoder_layers(model)[head.config.aux_layers[0]]
    assert torch.equal(head.midlayer.mlp.gate_proj.weight, layer.mlp.gate_proj.weight)
    backend.refresh(1e9)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))


def test_the_shape_is_known_without_weights_and_heads_of_another_one_load(tmp_path):
    with torch.device("meta"):
        bare = type(policy("qwen3"))(policy("qwen3").config)
    assert head_config(bare) == head_config(policy("qwen3"))
    assert head_config(bare) != HeadConfig.for_target(bare.config)  # heads saved before had the latter
    old = EagleHead(HeadConfig.for_target(bare.config), seed=3)
    save_head(tmp_path / "old", old, None, None, {})
    backend = EmbeddedBackend(policy("qwen3"), SpecConfig(draft_model_path=str(tmp_path / "old")))
    assert backend.learner.head.config == old.config
    assert torch.equal(load_head(tmp_path / "old", head_config(bare))[0].fc.weight, old.fc.weight)
