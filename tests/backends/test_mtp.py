"""A policy whose checkpoint has an MTP head: guesses from the first rollout on, the same tokens, nothing lost."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_layers import MtpLayer

from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.config import SpecConfig
from spec_rollout.draft.mtp import MtpHead
from spec_rollout.draft.mtp_checkpoint import FILE, add_to_policy, find_tensors
from spec_rollout.engine.target import cache_argument
from spec_rollout.records import SamplingParams
from tests.draft.test_mtp import random_head
from tests.tiny import PROMPTS, assert_same, make_policy, reference

PARAMS = SamplingParams(max_new_tokens=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy with an MTP head, as their makers publish them."""
    folder = tmp_path_factory.mktemp("policy")
    model = make_policy("qwen3_5_text")
    model.save_pretrained(folder)
    add_to_policy(folder, random_head(model).on_disk(torch.float32))
    return folder


def backend_of(folder, **options) -> EmbeddedBackend:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return EmbeddedBackend(model, SpecConfig(**({"num_speculative_tokens": 3} | options)))


def test_guesses_from_the_first_rollout_and_learns(folder):
    backend = backend_of(folder)
    expected = reference(backend.engine.target.model, PROMPTS, PARAMS)
    assert_same(backend.generate(PROMPTS, PARAMS), expected, 1e-3)
    assert backend.take_stats().drafted > 0
    stats = backend.refresh(seconds=20.0)
    assert stats.steps > 0 and sum(stats.acceptance) > sum(stats.acceptance_before)
    assert_same(backend.generate(PROMPTS, PARAMS), expected, 1e-3)
    assert backend.stats.drafted > 0 and not backend.stats.drafter_failures and backend.draft_healthy


@torch.no_grad()
def test_the_layer_is_transformers_own(folder):
    """Against the MTP layer that transformers has for other models: order of the two inputs, norms, positions."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    head = MtpHead.of(model, find_tensors(str(folder), model), folder).eval()
    layer = head.layers[0]
    theirs = MtpLayer(layer.self_attn.config, type(layer), type(head.final_norm), layer.self_attn.layer_idx).eval()
    theirs.eh_proj, theirs.mtp_block, theirs.post_norm = head.fc, layer, head.final_norm
    theirs.enorm, theirs.hnorm = head.pre_fc_norm_embedding, head.pre_fc_norm_hidden
    embeds, hidden, place = torch.randn(2, 7, 32), torch.randn(2, 7, 32), torch.arange(7).expand(2, -1)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    turns = model.model.rotary_emb(embeds, place[None].expand(3, -1, -1))
    given = {"position_embeddings": turns, "attention_mask": mask, "position_ids": place}
    expected = theirs(embeds, hidden, **given, **{cache_argument(theirs): None})
    torch.testing.assert_close(head.read(embeds, hidden, place, mask, DynamicCache()), expected)


def test_saved_and_resumed(folder, tmp_path):
    backend = backend_of(folder)
    backend.generate(PROMPTS, PARAMS)
    backend.refresh(seconds=5.0)
    backend.save(tmp_path / "draft")
    other = backend_of(folder)
    other.load(tmp_path / "draft")
    assert other.draft_version == backend.draft_version == 1
    for mine, theirs in ((other.learner.head, backend.learner.head), (other.drafter.head, backend.drafter.head)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    saved = other.learner.trainer.state_dict(), backend.learner.trainer.state_dict()
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][k], saved[1][k]) for k in saved[0])


def test_goes_back_beside_the_policy(folder, tmp_path):
    backend = backend_of(folder)
    backend.generate(PROMPTS, PARAMS)
    backend.refresh(seconds=5.0)
    backend.engine.target.model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert not find_tensors(str(tmp_path), backend.engine.target.model)  # transformers has lost it
    backend.save_with_policy(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    before, after = load_file(folder / FILE), load_file(tmp_path / FILE)
    assert before.keys() == after.keys() == {name for name in index if index[name] == FILE}
    assert not torch.equal(before["mtp.fc.weight"], after["mtp.fc.weight"])
    again = backend_of(tmp_path)
    assert torch.equal(again.learner.head.fc.weight, backend.learner.head.fc.weight)


def test_what_the_option_means(folder, tmp_path):
    assert isinstance(backend_of(folder).learner.head, MtpHead)
    assert not isinstance(backend_of(folder, draft_head="eagle3").learner.head, MtpHead)
    make_policy("qwen3_5_text").save_pretrained(tmp_path)
    assert not isinstance(backend_of(tmp_path).learner.head, MtpHead)
    with pytest.raises(ValueError, match="draft_head='mtp'.*holds no tensors named mtp"):
        backend_of(tmp_path, draft_head="mtp")
    foreign = load_file(folder / FILE)
    foreign["mtp.layers.0.input_layernorm_2.weight"] = torch.zeros(32)
    save_file(foreign, tmp_path / FILE)
    with pytest.raises(ValueError, match="layers.0.input_layernorm_2.weight .1 in all.* draft_head='eagle3'"):
        backend_of(tmp_path, draft_head="mtp")
    with pytest.warns(RuntimeWarning, match="An EAGLE-3 head is made"):
        assert not isinstance(backend_of(tmp_path).learner.head, MtpHead)
    for other in ({"rollout_backend": "vllm"}, {"compile_passes": True}):
        with pytest.raises(ValueError, match="draft_head='mtp' does not go with"):
            SpecConfig(draft_head="mtp", **other)
