"""Engine, head and controller together: the tokens of plain decoding from a head that has really learned."""

import pytest
import torch

from spec_rollout.backends import calibration, embedded
from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.config import SpecConfig
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.gamma import GammaController
from spec_rollout.records import SamplingParams
from tests.tiny import MAIN, PROMPTS, assert_same, policy

PARAMS = SamplingParams(max_new_tokens=40, temperature=0.3, eos_token_ids=(4,))


@pytest.fixture(autouse=True)
def generous(monkeypatch):
    """Time enough to learn the few sequences that a tiny policy draws at low temperature."""
    monkeypatch.setattr(embedded, "COLD_SHARE", 1e9)
    monkeypatch.setattr(embedded, "SHARE", 0.0)


def backend_for(name, tmp_path, gamma=3, **options):
    config = SpecConfig(num_speculative_tokens=gamma, calibration_cache=str(tmp_path), **options)
    return EmbeddedBackend(policy(name), config)


def learned(name, tmp_path, gamma=3, **options):
    backend = backend_for(name, tmp_path, gamma, **options)
    backend.generate(PROMPTS * 4, PARAMS)
    assert not backend.take_stats().drafted  # cold: plain decoding
    backend.refresh()
    return backend


def plain(name, seed=(0,)):
    return RolloutEngine(policy(name)).generate(PROMPTS * 4, PARAMS, seed=seed)


@pytest.mark.filterwarnings("error:The drafter broke")
@pytest.mark.parametrize("name", MAIN)
def test_a_learned_head_changes_no_token(name, tmp_path):
    backend = learned(name, tmp_path, max_slots=5)
    assert_same(backend.generate(PROMPTS * 4, PARAMS, seed=(1,)), plain(name, (1,)))
    assert backend.stats.mean_acceptance_length > 1


def test_adaptive_changes_no_token_and_calibrates_once(tmp_path):
    backend = learned("llama", tmp_path, gamma=None)
    assert_same(backend.generate(PROMPTS * 4, PARAMS, seed=(1,)), plain("llama", (1,)))
    assert isinstance(backend.controller, GammaController)
    assert backend.stats.drafted > 0
    (stored,) = tmp_path.glob("cost-*.json")
    written = stored.stat().st_mtime_ns
    again = learned("llama", tmp_path, gamma=None)
    again.generate(PROMPTS * 4, PARAMS)
    assert stored.stat().st_mtime_ns == written


def test_a_calibration_of_another_version_is_measured_again(tmp_path):
    backend = learned("llama", tmp_path, gamma=None)
    path = calibration._cache_path(backend.engine, 28, 7, str(tmp_path))
    path.write_text('[{"kind": "verify", "unknown": 1}]')
    backend.generate(PROMPTS * 4, PARAMS)
    assert "unknown" not in path.read_text()


def test_a_cold_head_learns_from_features_at_magnitude_1_and_runs_on_them_as_they_are(tmp_path):
    backend = backend_for("llama", tmp_path)
    backend.generate(PROMPTS * 4, PARAMS)
    features = torch.cat([s.features for s in backend.buffer.samples])[:, : backend.head.fc.in_features]
    assert features.square().mean().sqrt() > 4
    backend.refresh()
    scaled = features * backend.head.feature_scale
    assert 0.5 < scaled.square().mean().sqrt() < 2
    torch.testing.assert_close(backend.drafter.head.fuse(features), backend.head.fuse(scaled))


def test_evaluation_is_not_learned_from(tmp_path):
    backend = backend_for("llama", tmp_path)
    backend.generate(PROMPTS, PARAMS, collect=False)
    assert backend.refresh().steps == 0 and backend.draft_version == 0


def test_nothing_is_drafted_or_trained_at_zero(tmp_path):
    backend = backend_for("llama", tmp_path, gamma=0)
    assert_same(backend.generate(PROMPTS * 4, PARAMS), plain("llama"))
    assert backend.refresh().steps == 0 and backend.drafter is None
    backend.save(tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


@pytest.mark.parametrize("gamma", [3, None])
def test_save_and_load_give_the_same_guesses(gamma, tmp_path):
    backend = learned("llama", tmp_path, gamma=gamma)
    backend.generate(PROMPTS, PARAMS)
    backend.save(tmp_path / "draft")
    other = backend_for("llama", tmp_path, gamma, draft_model_path=str(tmp_path / "draft"))
    assert other.draft_version == backend.draft_version == 1 and other.drafter.ready
    for one in (backend, other):
        one.engine.controller = None  # both at the same number of guesses
        one.config.num_speculative_tokens = one.engine.config.num_speculative_tokens = 3
        one._ready_controller()
        one.take_stats()
        one.generate(PROMPTS, PARAMS, seed=(5,))
    ours, theirs = ([step.accepted for step in one.engine.stats.steps] for one in (backend, other))
    assert ours == theirs


def test_a_head_that_turns_to_nan_starts_afresh_and_no_token_is_wrong(tmp_path):
    backend = learned("llama", tmp_path)
    with torch.no_grad():
        for head in (backend.head, backend.drafter.head):
            head.fc.weight[0, 0] = float("nan")
    assert_same(backend.generate(PROMPTS * 4, PARAMS, seed=(1,)), plain("llama", (1,)))
    backend._allowance = 1e9
    with pytest.warns(RuntimeWarning, match="draft head is off"):
        backend.refresh()
    assert not backend.draft_healthy and not backend.drafter.ready
    assert all(torch.isfinite(p).all() for p in backend.head.parameters())
    assert_same(backend.generate(PROMPTS * 4, PARAMS, seed=(2,)), plain("llama", (2,)))
