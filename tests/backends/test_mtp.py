"""A policy whose checkpoint has an MTP head: guesses from the first rollout on, the same tokens, nothing lost."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_layers import MtpLayer, MtpModel

from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.config import SpecConfig
from spec_rollout.draft import refresh
from spec_rollout.draft.mtp import MtpHead
from spec_rollout.draft.mtp_checkpoint import FILE, add_to_policy, find_tensors
from spec_rollout.draft.mtp_names import appended
from spec_rollout.engine.support import cache_argument
from spec_rollout.records import SamplingParams
from tests.draft.test_mtp import random_head
from tests.draft.test_mtp_names import HEADS
from tests.tiny import PROMPTS, assert_same, make_policy, reference

PARAMS = SamplingParams(max_new_tokens=16)


@pytest.fixture(scope="module", params=HEADS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return published(name, tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return published("qwen3_5_text", tmp_path_factory.mktemp("policy"))


def published(name, folder):
    """A policy with an MTP head in `folder`, as their makers publish them."""
    model = make_policy(name)
    model.save_pretrained(folder)
    add_to_policy(folder, random_head(model, HEADS[name]).on_disk(torch.float32))
    return folder


def backend_of(folder, **options) -> EmbeddedBackend:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return EmbeddedBackend(model, SpecConfig(**({"num_speculative_tokens": 3, "draft_ngrams": False} | options)))


@pytest.mark.usefixtures("patient_watchman")
def test_guesses_from_the_first_rollout_and_learns(folder, monkeypatch):
    """The tokens are those of plain decoding at both temperatures; by heart it guesses the greedy ones."""
    monkeypatch.setattr(refresh, "MAX_EPOCHS", 40)
    monkeypatch.setattr(refresh, "UNROLLED_STEPS", 3)
    backend = backend_of(folder, draft_learning_rate=0.3)
    laws = [replace(PARAMS, temperature=0), PARAMS]
    expected = [reference(backend.engine.target.model, PROMPTS, law) for law in laws]
    lengths = []
    for trained in (False, True):
        if trained:
            assert backend.refresh(seconds=1e9).steps == 40
        for law, completions in zip(laws, expected, strict=True):
            assert_same(backend.generate(PROMPTS, law, collect=law.greedy), completions, 1e-3)
            stats = backend.take_stats()
            assert stats.drafted > 0 and not stats.drafter_failures and backend.draft_healthy
            lengths.append(stats.mean_acceptance_length)
    assert lengths[2] > 1.3 > lengths[0]


@torch.no_grad()
def test_transformers_finds_the_same_head_in_what_was_saved(name, folder, tmp_path):
    """Those families whose head transformers can run: names, stacks of experts, order of the inputs, norms."""
    if HEADS[name] != appended(2):
        pytest.skip("transformers drops this head")
    backend = backend_of(folder)
    backend.engine.target.model.save_pretrained(tmp_path, max_shard_size="50KB")
    backend.save_with_policy(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2.*"]  # it knows the published sizes only
    theirs = MtpModel.from_pretrained(model).eval().layers[0]
    embeds, hidden, given = inputs(model)
    expected = theirs(embeds, hidden, **given, **{cache_argument(theirs): None})
    mask = given["attention_mask"]
    torch.testing.assert_close(
        backend.learner.head.read(embeds, hidden, given["position_ids"], mask, DynamicCache()), expected
    )


def inputs(model):
    """Embeddings, hidden states, and what else an MTP layer of `model` is given."""
    torch.manual_seed(2)
    embeds, hidden, place = torch.randn(2, 7, 32), torch.randn(2, 7, 32), torch.arange(7).expand(2, -1)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    rotary = model.model.rotary_emb
    turns = rotary(embeds, place[None].expand(3, -1, -1) if hasattr(rotary, "mrope_section") else place)
    return embeds, hidden, {"position_embeddings": turns, "attention_mask": mask, "position_ids": place}


@torch.no_grad()
def test_the_layer_is_transformers_own(folder):
    """Against the MTP layer that transformers has for other models: order of the two inputs, norms, positions."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    head = MtpHead.of(model, find_tensors(str(folder), model), folder).eval()
    layer = head.layers[0]
    theirs = MtpLayer(layer.self_attn.config, type(layer), type(head.final_norm), layer.self_attn.layer_idx).eval()
    theirs.eh_proj, theirs.mtp_block, theirs.post_norm = head.fc, layer, head.final_norm
    theirs.enorm, theirs.hnorm = head.pre_fc_norm_embedding, head.pre_fc_norm_hidden
    embeds, hidden, given = inputs(model)
    expected = theirs(embeds, hidden, **given, **{cache_argument(theirs): None})
    own = head.read(embeds, hidden, given["position_ids"], given["attention_mask"], DynamicCache())
    torch.testing.assert_close(own, expected)


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
    assert any(not torch.equal(before[key], after[key]) for key in before)
    again, own = (b.learner.head.state_dict() for b in (backend_of(tmp_path), backend))
    assert all(torch.equal(again[key], own[key]) for key in own)


def test_what_the_option_means(dense, tmp_path):
    folder = dense
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
    with pytest.raises(ValueError, match="draft_head='mtp' does not go with"):
        SpecConfig(draft_head="mtp", compile_passes=True)
