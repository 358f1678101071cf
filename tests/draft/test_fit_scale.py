"""The head reads features of any magnitude at magnitude 1, and nothing is lost on the way to disk and back."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from spec_rollout.draft.checkpoint import WEIGHTS, save_head
from spec_rollout.draft.checkpoint_reader import load_head
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from tests.tiny import VOCAB, policy

MAGNITUDES = (0.02, 37.0, 900.0)


@pytest.fixture(scope="module")
def shape():
    return replace(HeadConfig.for_target(policy("llama").config), aux_layers=(1, 2, 3))


@pytest.fixture
def features(shape):
    generator, size = torch.Generator().manual_seed(0), (200, shape.hidden_size)
    blocks = [magnitude * torch.randn(size, generator=generator) for magnitude in MAGNITUDES]
    channels = torch.linspace(0.1, 5.0, shape.hidden_size)
    return torch.cat([*blocks, channels * torch.randn(size, generator=generator)], -1)


def test_a_fresh_head_starts_at_the_scale_of_the_policy(shape, features):
    head = EagleHead(shape)
    head.fit_scale(features, fresh=True)
    fused = head.fuse(features[:, : head.fc.in_features] * head.feature_scale)
    assert 0.5 < fused.square().mean().sqrt() < 2.0
    normed = head.norm(fused)
    final = features[:, head.fc.in_features :]
    torch.testing.assert_close(normed.square().mean(0).sqrt(), final.square().mean(0).sqrt(), rtol=1e-3, atol=1e-3)


def test_fitting_twice_is_fitting_once(shape, features):
    once, twice = EagleHead(shape), EagleHead(shape)
    once.fit_scale(features, fresh=True)
    for _ in range(2):
        twice.fit_scale(features, fresh=True)
    assert torch.equal(once.feature_scale, twice.feature_scale) and torch.equal(once.fc.weight, twice.fc.weight)
    assert torch.equal(once.norm.weight, twice.norm.weight)


def test_a_trained_head_goes_on_computing_the_same(shape, features):
    head = EagleHead(shape)
    fused = features[:, : head.fc.in_features]
    before = head.fuse(fused)
    head.fit_scale(features, fresh=False)
    assert (head.feature_scale != 1).any()
    torch.testing.assert_close(head.fuse(fused * head.feature_scale), before)


def test_scales_fold_into_the_file_and_out_of_it_exactly(shape, features, tmp_path):
    head = EagleHead(shape, seed=3)
    head.fit_scale(features, fresh=True)
    save_head(tmp_path / "draft", head, torch.randn(VOCAB, shape.hidden_size), None, {})
    fused = features[:, : head.fc.in_features]
    read_by_others = fused @ load_file(tmp_path / "draft" / WEIGHTS)["fc.weight"].T
    torch.testing.assert_close(read_by_others, head.fuse(fused * head.feature_scale))
    loaded, _, extra = load_head(tmp_path / "draft", shape)
    assert torch.equal(loaded.fc.weight, head.fc.weight) and extra == {}
    assert torch.equal(loaded.feature_scale, head.feature_scale)


@pytest.mark.parametrize("scale", ["[1.0, -1.0, 1.0]", "[1.0, Infinity, 1.0]", "[1.0]", "2.0", '"all"'])
def test_a_tampered_scale_is_refused(shape, tmp_path, scale):
    save_head(tmp_path / "draft", EagleHead(shape), torch.randn(VOCAB, shape.hidden_size), None, {})
    config = tmp_path / "draft" / "config.json"
    text, found = re.subn(r'("feature_scale": )\[[^]]*\]', rf"\g<1>{scale}", config.read_text())
    assert found == 1
    config.write_text(text)
    with pytest.raises(ValueError, match="feature_scale=.* must be 3 positive numbers"):
        load_head(tmp_path / "draft", shape)
