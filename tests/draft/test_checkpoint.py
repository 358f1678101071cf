"""A draft on disk: what is written is what is read, and what cannot be read is refused by name."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spec_rollout.draft.checkpoint import CONFIG, WEIGHTS, save_head
from spec_rollout.draft.checkpoint_reader import load_head, load_optimizer
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from tests.tiny import VOCAB, policy


@pytest.fixture(scope="module")
def shape():
    return HeadConfig.for_target(policy("llama").config)


@pytest.fixture
def folder(shape, tmp_path):
    ids = torch.tensor([0, 3, 4, 9, 50])
    save_head(
        tmp_path / "draft",
        EagleHead(shape, seed=3),
        torch.randn(5, shape.hidden_size),
        ids,
        {"draft_version": 7},
        {"momentum": torch.ones(2)},
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
    assert [path.name for path in folder.glob("*.safetensors")] == [WEIGHTS]  # they would read any other too
    assert load_optimizer(folder)["momentum"].tolist() == [1, 1]


def test_saving_again_replaces_the_folder_as_a_whole(shape, folder):
    (folder / "stale").write_text("")
    save_head(folder, EagleHead(shape, seed=4), torch.randn(VOCAB, shape.hidden_size), None, {})
    assert {p.name for p in folder.iterdir()} == {CONFIG, WEIGHTS}
    assert [p.name for p in folder.parent.iterdir()] == ["draft"]
    assert load_head(folder, shape)[1] is None


def foreign(folder, shape, *, own_rows=5, **changes):
    """The folder as others write heads: with an output head of its own, and none of our fields."""
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    del config["spec_rollout"]
    tensors["lm_head.weight"] = torch.randn(own_rows, shape.hidden_size)
    tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool)
    tensors["embed_tokens.weight"] = torch.randn(VOCAB, shape.hidden_size)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    return tensors


def test_a_head_from_elsewhere_keeps_its_own_output_head(shape, folder):
    tensors = foreign(folder, shape)
    head, ids, extra = load_head(folder, shape)
    assert torch.equal(head.own_output, tensors["lm_head.weight"])
    assert ids.tolist() == [0, 3, 4, 9, 50] and extra == {}
    save_head(folder, head, torch.randn(5, shape.hidden_size), ids, {})
    assert torch.equal(load_head(folder, shape)[0].own_output, tensors["lm_head.weight"])


def test_a_speculators_head(shape, folder):
    """Its config is nested, its layer has another name, and it adds to its normed input."""
    tensors = foreign(folder, shape)
    config = json.loads((folder / CONFIG).read_text())
    aux = config.pop("eagle_config")["eagle_aux_hidden_state_layer_ids"]
    nested = {
        k: v for k, v in config.items() if k not in ("architectures", "draft_vocab_size", "norm_before_residual")
    }
    (folder / CONFIG).write_text(
        json.dumps(
            {
                "speculators_model_type": "eagle3",
                "architectures": ["Eagle3DraftModel"],
                "draft_vocab_size": 5,
                "eagle_aux_hidden_state_layer_ids": aux,
                "transformer_layer_config": nested,
            }
        )
    )
    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    save_file({**renamed, "verifier_norm.weight": torch.ones(shape.hidden_size)}, folder / WEIGHTS)
    head, ids, _ = load_head(folder, shape)
    assert head.config.norm_before_residual and head.config.aux_layers == shape.aux_layers and len(ids) == 5
    x = torch.randn(1, 3, shape.hidden_size)
    nothing = torch.zeros(1, shape.num_attention_heads, 3, shape.head_dim)
    head.midlayer.mlp.down_proj.weight.data.zero_()
    torch.testing.assert_close(head.combine(nothing, x), head.midlayer.hidden_norm(x))


KILLED = """
import os, signal, sys, torch
import spec_rollout.draft.checkpoint as checkpoint
from spec_rollout.draft.eagle import EagleHead
from tests.draft.test_checkpoint import HeadConfig, policy
shape, moment = HeadConfig.for_target(policy("llama").config), sys.argv[2]
rename, renames = checkpoint.Path.rename, []
def die(*args):
    if moment == "save_file":
        args[1].write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
def die_in_a_rename(*args):
    renames.append(args)
    return die() if len(renames) == int(moment) else rename(*args)
if moment == "save_file":
    checkpoint.save_file = die
else:
    checkpoint.Path.rename = die_in_a_rename
checkpoint.save_head(sys.argv[1], EagleHead(shape, seed=4), torch.randn(5, shape.hidden_size), None, {})
"""


@pytest.mark.parametrize("moment", ["save_file", "1", "2"])
def test_kill_9_while_saving_leaves_the_old_head(shape, folder, moment):
    """Half-way through the weights, before the first rename, or between the two."""
    ended = subprocess.run([sys.executable, "-c", KILLED, str(folder), moment], cwd=Path(__file__).parents[2])
    assert ended.returncode == -signal.SIGKILL
    if moment == "2":
        assert not folder.exists()
        (folder,) = folder.parent.glob(".draft-old-*/draft")
    head, _, extra = load_head(folder, shape)
    assert extra == {"draft_version": 7}
    assert torch.equal(head.fc.weight, EagleHead(shape, seed=3).fc.weight)


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


def not_finite(name, value):
    def spoil(folder):
        tensors = load_file(folder / WEIGHTS)
        tensors[name].view(-1)[0] = value
        save_file(tensors, folder / WEIGHTS)

    return spoil


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
        (not_finite("fc.weight", float("nan")), r"NaN or infinite numbers \(fc\.weight\)"),
        (not_finite("midlayer.mlp.up_proj.weight", float("-inf")), "NaN or infinite numbers"),
        (rewrite(hidden_size=64), "hidden_size=64, this policy has 32"),
        (rewrite(vocab_size=1000), f"vocab_size=1000, this policy has {VOCAB}"),
        (rewrite(rope_scaling={"rope_type": "llama3"}), "rope_type=llama3 needs factor, low_freq_factor"),
        (rewrite(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type=dynamic is not supported, only default"),
        (rewrite(hidden_act="gelu"), "hidden_act=gelu is not supported, only silu"),
        (rewrite(speculators_model_type="mlp"), "'mlp' speculator, not 'eagle3'"),
        (
            rewrite(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1, 7]}),
            r"\(0, 1, 7\), this policy has 2",
        ),
    ],
)
def test_a_foreign_or_broken_folder_is_refused(shape, folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        load_head(folder, shape)
