"""A draft on disk: what is written is what is read, and what cannot be read is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from spec_rollout.draft.checkpoint import CONFIG, WEIGHTS, load_head, save_head
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from tests.tiny import VOCAB, policy


@pytest.fixture(scope="module")
def shape():
    return HeadConfig.for_target(policy("llama").config)


@pytest.fixture
def folder(shape, tmp_path):
    ids = torch.tensor([0, 3, 4, 9, 50])
    save_head(
        tmp_path / "draft", EagleHead(shape, seed=3), torch.randn(5, shape.hidden_size), ids, {"draft_version": 7}
    )
    return tmp_path / "draft"


def test_round_trip(shape, folder):
    head, ids, extra = load_head(folder, shape)
    for name, tensor in EagleHead(shape, seed=3).state_dict().items():
        assert torch.equal(tensor, head.state_dict()[name]), name
    assert ids.tolist() == [0, 3, 4, 9, 50] and extra == {"draft_version": 7} and head.config == shape


def test_the_folder_has_the_shape_that_serving_engines_read(shape, folder):
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["draft_vocab_size"] == 5
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == list(shape.aux_layers)
    assert tensors["d2t"].tolist() == [0, 2, 2, 6, 46] and tensors["d2t"].dtype == torch.int64  # offsets
    width = shape.hidden_size
    assert tensors["fc.weight"].shape == (width, len(shape.aux_layers) * width)
    assert tensors["midlayer.self_attn.q_proj.weight"].shape[1] == 2 * width
    assert tensors["lm_head.weight"].shape == (5, width)


def test_saving_again_replaces_the_folder_as_a_whole(shape, folder):
    (folder / "stale").write_text("")
    save_head(folder, EagleHead(shape, seed=4), torch.randn(VOCAB, shape.hidden_size), None, {})
    assert {p.name for p in folder.iterdir()} == {CONFIG, WEIGHTS}
    assert [p.name for p in folder.parent.iterdir()] == ["draft"]
    assert load_head(folder, shape)[1] is None


def truncate(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def drop_a_weight(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["midlayer.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS)


def point_outside(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["d2t"][-1] = VOCAB
    save_file(tensors, folder / WEIGHTS)


def rewrite(**changes):
    def spoil(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changes}))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), "not a readable draft head"),
        (lambda folder: (folder / CONFIG).write_text("{"), "not a readable draft head"),
        (truncate, "not a readable draft head"),
        (drop_a_weight, r"midlayer\.mlp\.up_proj\.weight"),
        (point_outside, "another tokenizer"),
        (rewrite(hidden_size=64), "hidden_size=64, this policy has 32"),
        (rewrite(vocab_size=1000), f"vocab_size=1000, this policy has {VOCAB}"),
        (rewrite(architectures=["LlamaForCausalLM"]), "not an EAGLE-3 head"),
    ],
)
def test_a_foreign_or_broken_folder_is_refused(shape, folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        load_head(folder, shape)
