"""EAGLE-3 heads as their authors publish them: known by their tensors, and computing what they computed there."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.config import SpecConfig
from spec_rollout.draft.checkpoint import CONFIG, WEIGHTS, save_head
from spec_rollout.draft.checkpoint_reader import load_head
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.records import SamplingParams
from tests.tiny import VOCAB, policy

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
IDS = torch.tensor([0, 3, 4, 9, 50])


@pytest.fixture(scope="module")
def deep():
    """A policy deep enough for the layers that the authors read."""
    torch.manual_seed(0)
    config = copy.deepcopy(policy("llama").config)
    config.num_hidden_layers = 8
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def shape(deep):
    return HeadConfig.for_target(deep.config)


def publish(folder, shape, *, pickled=False, rename=lambda name: name, drop=(), extra=None, **changes):
    """A head as others write it, with an output head of its own; returns its tensors by our names."""
    save_head(folder, EagleHead(shape, seed=3), torch.randn(5, shape.hidden_size), IDS, {})
    tensors = load_file(folder / WEIGHTS)
    given = {rename(name): t.to(torch.float16) for name, t in tensors.items() if name not in ("d2t", *drop)}
    given |= {} if "d2t" in drop else {"d2t": tensors["d2t"]}
    given |= {"t2d": torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, IDS, True)} | (extra or {})
    (folder / WEIGHTS).unlink()
    if pickled:
        torch.save(given, folder / "pytorch_model.bin")
    else:
        save_file(given, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    for name in ("spec_rollout", "eagle_config", "head_dim"):
        del config[name]
    config = {name: value for name, value in {**config, **changes}.items() if value is not None}
    (folder / CONFIG).write_text(json.dumps(config))
    return tensors


def vllm_names(name: str) -> str:
    return name.replace("midlayer.", "model.layers.0.") if name != "lm_head.weight" else name


AUTHORS = {"architectures": ["LlamaForCausalLM"], "rope_scaling": LLAMA3}
LAYOUTS = {
    "the authors': pytorch_model.bin, LlamaForCausalLM, llama3": {"pickled": True, **AUTHORS},
    "the authors' Vicuna: layers of the target counted": {"pickled": True, **AUTHORS, "num_hidden_layers": 40},
    "vLLM's names": {"rename": vllm_names, **AUTHORS, "architectures": ["Eagle3LlamaForCausalLM"]},
    "all within model.": {"rename": "model.{}".format, **AUTHORS, "architectures": None},
    "with buffers": {**AUTHORS, "extra": {"midlayer.self_attn.rotary_emb.inv_freq": torch.ones(2)}},
    "t2d alone": {"drop": ("d2t",), **AUTHORS},
    "type for rope_type": {**AUTHORS, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "layers named": {**AUTHORS, "eagle_aux_hidden_state_layer_ids": [1, 3, 6]},
    "rope_parameters": {**AUTHORS, "rope_scaling": None, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_head_is_read(shape, tmp_path, layout):
    tensors = publish(tmp_path / "head", shape, **LAYOUTS[layout])
    head, ids, _ = load_head(tmp_path / "head", shape)
    assert head.config.aux_layers == ((1, 3, 6) if layout == "layers named" else (2, 4, 5))
    assert ids.tolist() == IDS.tolist() and head.own_output is not None
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, tensors[name].half().float()), name
    rope = LAYOUTS[layout].get("rope_scaling")
    assert head.config.rope_scaling["rope_type"] == ("linear" if rope and "type" in rope else "llama3")
    save_head(tmp_path / "again", head, None, ids, {})
    assert load_head(tmp_path / "again", shape)[0].config == head.config


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        LLAMA3,
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda scaling: "default" if scaling is None else scaling["rope_type"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rope_is_transformers_own(shape, scaling, dtype):
    config = HeadConfig(**{**shape.to_dict(), "rope_theta": 500.0, "rope_scaling": scaling})
    head = EagleHead(config).to(dtype)
    torch.manual_seed(0)
    embeds, hidden = torch.randn(2, 1, 7, config.hidden_size).to(dtype)
    positions = torch.arange(7)[None] * 300
    q, k, _ = head.project(embeds, hidden, positions)
    flat, _, _ = EagleHead(config).to(dtype).project(embeds, hidden, positions * 0)
    own = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", **(scaling or {}), "rope_theta": 500.0},
    )
    cos, sin = LlamaRotaryEmbedding(own)(hidden, positions)
    factor = head.rope_size  # the rotation by 0 scales too
    expected, _ = apply_rotary_pos_emb(flat / factor, k, cos, sin)
    torch.testing.assert_close(q, expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.05)
    assert head.frequency.dtype == torch.float32


def test_a_published_head_guesses_for_a_policy(deep, shape, tmp_path):
    publish(tmp_path / "head", shape, pickled=True, **AUTHORS)
    params, prompts = SamplingParams(max_new_tokens=8), [[1, 2, 3]]
    config = SpecConfig(num_speculative_tokens=2, draft_model_path=str(tmp_path / "head"), draft_ngrams=False)
    backend = EmbeddedBackend(deep, config)
    assert backend.learner.head.config.rope_scaling == LLAMA3
    drawn = backend.generate(prompts, params)
    plain = EmbeddedBackend(deep, SpecConfig(num_speculative_tokens=0)).generate(prompts, params)
    assert [c.token_ids for c in drawn] == [c.token_ids for c in plain]
    assert backend.stats.drafted > 0 and backend.draft_healthy


def first_eagle(folder, shape):
    publish(folder, shape, drop=("midlayer.hidden_norm.weight", "norm.weight"), **AUTHORS)


def several_layers(folder, shape):
    publish(folder, shape, extra={"model.layers.1.input_layernorm.weight": torch.ones(4)}, **AUTHORS)


def a_language_model(folder, shape):
    LlamaForCausalLM(policy("llama").config).save_pretrained(folder)


def more_than_tensors(folder, shape):
    publish(folder, shape, pickled=True, **AUTHORS)
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"fc.weight": Exception}, file)


def a_list(folder, shape):
    publish(folder, shape, pickled=True, **AUTHORS)
    torch.save([torch.ones(1)], folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (first_eagle, r"no EAGLE-3 head: midlayer.hidden_norm.weight, norm.weight is missing"),
        (several_layers, "a head of several layers"),
        (a_language_model, r"no EAGLE-3 head: fc.weight, midlayer.hidden_norm.weight is missing"),
        (more_than_tensors, r"pytorch_model.bin: ValueError: torch.load\(weights_only=True\) refuses it"),
        (a_list, "something else than a dictionary of tensors"),
    ],
)
def test_what_is_no_head_is_refused_by_its_tensors(shape, tmp_path, write, message):
    write(tmp_path / "head", shape)
    with pytest.raises(ValueError, match=message):
        load_head(tmp_path / "head", shape)
