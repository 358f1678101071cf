"""Engine, head and controller together: the tokens of plain decoding from a head that has really learned."""

import json

import pytest
import torch

from spec_rollout.backends.kept_seconds import path_of
from spec_rollout.draft.eagle import EagleHead
from spec_rollout.gamma import FixedGamma, GammaController
from tests.backends.learned import PARAMS, backend_for, learned, plain
from tests.tiny import PROMPTS, assert_same
from tests.tiny_configs import MAIN

pytestmark = pytest.mark.usefixtures("generous")


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
    stored = list(tmp_path.glob("cost-*.json"))
    for path in stored:  # whether guessing pays must not depend on the machine
        saved = json.loads(path.read_text())
        for measured in saved["measurements"]:
            measured["seconds"] = 1e-6 if measured["kind"] == "draft" else 1e-3
        path.write_text(json.dumps(saved))
    written = [path.stat().st_mtime_ns for path in stored]
    again = learned("llama", tmp_path, gamma=None)
    assert_same(again.generate(PROMPTS * 4, PARAMS, seed=(1,)), plain("llama", (1,)))
    assert again.stats.drafted > 0
    assert len(stored) == 2 and [path.stat().st_mtime_ns for path in stored] == written


def test_a_calibration_of_another_version_is_measured_again(tmp_path):
    backend = backend_for("llama", tmp_path, gamma=None)
    backend.generate(PROMPTS * 4, PARAMS)
    path = path_of(backend.engine, 7, str(tmp_path), backend.drafter.shape)
    path.write_text('[{"kind": "verify", "unknown": 1}]')
    backend.refresh()
    assert "unknown" not in path.read_text()


def test_nothing_is_drafted_or_trained_at_zero(tmp_path):
    backend = backend_for("llama", tmp_path, gamma=0)
    assert_same(backend.generate(PROMPTS * 4, PARAMS), plain("llama"))
    assert backend.refresh().steps == 0 and backend.drafter is None
    backend.save(tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


def test_more_rows_than_were_measured_are_measured_and_the_correction_stays(tmp_path):
    backend = learned("llama", tmp_path, gamma=None)
    few = backend.controller.cost
    backend.generate(PROMPTS * 12, PARAMS, seed=(1,))
    cost = backend.controller.cost
    assert {m.rows for m in cost._measurements} - {m.rows for m in few._measurements} == {64}
    assert cost._correction is few._correction
    backend.generate(PROMPTS * 10, PARAMS, seed=(2,))
    assert backend.controller.cost is cost


@pytest.mark.parametrize("gamma", [3, None])
def test_save_and_load_give_the_same_guesses(gamma, tmp_path):
    backend = learned("llama", tmp_path, gamma=gamma)
    backend.generate(PROMPTS, PARAMS)
    backend.save(tmp_path / "draft")
    other = backend_for("llama", tmp_path, gamma, draft_model_path=str(tmp_path / "draft"))
    assert other.draft_version == backend.draft_version == 1 and other.drafter.ready
    for one in (backend, other):
        one.head.controller = one.head.watched = FixedGamma(3)  # both at the same number of guesses
        one.take_stats()
        one.generate(PROMPTS, PARAMS, seed=(5,))
    ours, theirs = ([step.accepted for step in one.engine.stats.steps] for one in (backend, other))
    assert ours == theirs


def test_a_head_that_turns_to_nan_starts_afresh_and_no_token_is_wrong(tmp_path):
    backend = learned("llama", tmp_path)
    with torch.no_grad():
        for head in (backend.learner.head, backend.drafter.head):
            head.fc.weight[0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match="is off .* weights are not finite"):
        assert_same(backend.generate(PROMPTS * 12, PARAMS, seed=(1,)), plain("llama", (1,), 12))
    assert not backend.draft_healthy and backend.stats.steps[-1].gamma == 0
    with pytest.warns(RuntimeWarning, match="learns again from new weights"):
        backend.refresh()
    assert backend.draft_healthy and backend.drafter.ready  # it had rollouts to learn from
    assert all(torch.isfinite(p).all() for p in backend.learner.head.parameters())
    backend.take_stats()
    assert_same(backend.generate(PROMPTS * 4, PARAMS, seed=(2,)), plain("llama", (2,)))
    assert backend.stats.mean_acceptance_length > 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_head_of_another_run_that_is_not_finite_is_refused(tmp_path, value):
    backend = learned("llama", tmp_path / "costs")
    with torch.no_grad():
        backend.learner.head.fc.weight[0, 0] = value
    backend.save(tmp_path / "head")
    with pytest.raises(ValueError, match="head holds NaN or infinite"):
        backend_for("llama", tmp_path / "costs", draft_model_path=str(tmp_path / "head"))


@pytest.mark.filterwarnings("error:The drafter broke")
@pytest.mark.parametrize("ngrams", [True, False])
def test_rejection_sampling_calibrates_learns_and_guesses(tmp_path, ngrams):
    backend = backend_for("llama", tmp_path, gamma=None, verification="rejection", draft_ngrams=ngrams)
    backend.generate(PROMPTS * 4, PARAMS)
    backend.refresh()
    backend.generate(PROMPTS * 8, PARAMS, seed=(1,))  # more rows are measured
    assert backend.learner.trained and isinstance(backend.controller, GammaController)
    source = backend.ngrams if backend.engine.drafter is backend.ngrams.drafter else backend.head
    source.watched.choose = lambda rows, context: 2
    backend.take_stats()
    drawn = backend.generate(PROMPTS * 8, PARAMS, seed=(2,))
    assert all(c.token_ids for c in drawn) and backend.stats.mean_acceptance_length > 1


def test_a_drafter_that_breaks_in_a_rollout_is_not_healthy(tmp_path, monkeypatch):
    backend = learned("llama", tmp_path)
    with monkeypatch.context() as broken, pytest.warns(RuntimeWarning, match="The drafter broke"):
        broken.setattr(backend.drafter, "propose", lambda *given: 1 / 0)
        assert_same(backend.generate(PROMPTS * 4, PARAMS, seed=(1,)), plain("llama", (1,)))
    assert not backend.draft_healthy
    backend.take_stats()
    assert_same(backend.generate(PROMPTS * 4, PARAMS, seed=(2,)), plain("llama", (2,)))
    assert backend.draft_healthy and backend.stats.mean_acceptance_length > 1


@pytest.mark.parametrize("gamma", [3, None])
def test_a_draft_that_was_lost_is_noticed_and_learned_again(gamma, tmp_path):
    """As after a sync that went wrong: off within a few steps, on again after the next training."""
    backend = learned("llama", tmp_path, gamma)
    if gamma is None:
        backend.controller.choose = lambda rows, context: 3  # the adaptive one would stop guessing by itself
    other = EagleHead(backend.learner.head.config, seed=9)
    backend.drafter.head.load_state_dict({n: -30 * t for n, t in other.state_dict().items()})
    backend.head.watched.expected = 1.0  # a tiny policy's few tokens are often guessed by chance
    with pytest.warns(RuntimeWarning, match="is off .* the policy has moved away"):
        assert_same(backend.generate(PROMPTS * 12, PARAMS, seed=(1,)), plain("llama", (1,), 12))
    assert not backend.draft_healthy and backend.stats.steps[-1].gamma == 0
    backend.refresh()
    assert backend.draft_healthy
