"""Engine, head and controller together: the tokens of plain decoding from a head that has really learned."""

import pytest
import torch

from spec_rollout.backends import calibration
from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.config import SpecConfig
from spec_rollout.draft import learner, refresh
from spec_rollout.draft.budget import RefreshBudget
from spec_rollout.draft.eagle import EagleHead
from spec_rollout.draft.refresh import BURST, FIRST_BURST, DraftTrainer
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.gamma import FixedGamma, GammaController
from spec_rollout.gamma.saving import RolloutValue
from spec_rollout.records import SamplingParams
from tests.tiny import MAIN, PROMPTS, assert_same, policy

PARAMS = SamplingParams(max_new_tokens=40, temperature=0.3, eos_token_ids=(4,))


@pytest.fixture(autouse=True)
def generous(monkeypatch):
    """Whatever a training gains, it pays."""
    monkeypatch.setattr(refresh, "MAX_EPOCHS", 20)
    monkeypatch.setattr(RolloutValue, "hope", lambda self, rates: 1e9)
    monkeypatch.setattr(RolloutValue, "slope", lambda self, rates: 1e9)


def backend_for(name, tmp_path, gamma=3, **options):
    """Time enough for the head, which guesses alone, to learn the few sequences that a tiny policy draws at low
    temperature."""
    options = {"draft_overhead": 1e9, "draft_ngrams": False} | options
    config = SpecConfig(num_speculative_tokens=gamma, calibration_cache=str(tmp_path), **options)
    return EmbeddedBackend(policy(name), config)


def learned(name, tmp_path, gamma=3, **options):
    backend = backend_for(name, tmp_path, gamma, **options)
    backend.generate(PROMPTS * 4, PARAMS)
    assert not backend.take_stats().drafted  # cold: plain decoding
    backend.refresh()
    return backend


def plain(name, seed=(0,), copies=4):
    return RolloutEngine(policy(name)).generate(PROMPTS * copies, PARAMS, seed=seed)


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
    stored = list(tmp_path.glob("cost-*.json"))
    written = [path.stat().st_mtime_ns for path in stored]
    again = learned("llama", tmp_path, gamma=None)
    again.generate(PROMPTS * 4, PARAMS)
    assert len(stored) == 2 and [path.stat().st_mtime_ns for path in stored] == written


def test_a_calibration_of_another_version_is_measured_again(tmp_path):
    backend = backend_for("llama", tmp_path, gamma=None)
    backend.generate(PROMPTS * 4, PARAMS)
    path = calibration._cache_path(backend.engine, 7, str(tmp_path), backend.drafter.shape)
    path.write_text('[{"kind": "verify", "unknown": 1}]')
    backend.refresh()
    assert "unknown" not in path.read_text()


def test_a_cold_head_learns_from_features_at_magnitude_1_and_runs_on_them_as_they_are(tmp_path):
    backend = backend_for("llama", tmp_path)
    backend.generate(PROMPTS * 4, PARAMS)
    width = backend.learner.head.fc.in_features
    features = torch.cat([s.features for s in backend.learner.buffer.samples])[:, :width]
    assert features.square().mean().sqrt() > 4
    backend.refresh()
    head = backend.learner.head
    scaled = features * head.feature_scale
    assert 0.5 < scaled.square().mean().sqrt() < 2
    torch.testing.assert_close(backend.drafter.head.fuse(features), head.fuse(scaled))


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


def test_a_training_that_fails_starts_over_and_decodes_plainly(tmp_path, monkeypatch):
    backend = learned("llama", tmp_path)
    backend.generate(PROMPTS, PARAMS)
    monkeypatch.setattr(DraftTrainer, "loss", lambda self, batch: self.head.fc.weight.sum() * float("inf"))
    with pytest.warns(RuntimeWarning, match="learns again from new weights: The draft's loss is"):
        assert backend.refresh().steps == 0
    assert not backend.draft_healthy and not backend.drafter.ready
    backend.take_stats()
    assert_same(backend.generate(PROMPTS * 4, PARAMS, seed=(2,)), plain("llama", (2,)))
    assert not backend.stats.drafted


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


def test_a_training_without_memory_goes_on_in_smaller_batches(tmp_path, monkeypatch):
    backend = learned("llama", tmp_path)
    loss, before = DraftTrainer.loss, backend.draft_version

    def fits_only_half(self, batch):
        if batch.tokens.numel() > refresh.BATCH_TOKENS // 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(self, batch)

    monkeypatch.setattr(DraftTrainer, "loss", fits_only_half)
    with pytest.warns(RuntimeWarning, match=f"batches of {refresh.BATCH_TOKENS // 2} tokens"):
        backend.generate(PROMPTS * 12, PARAMS)
        assert backend.refresh().steps == 0
    assert backend.draft_healthy and backend.draft_version == before
    backend.generate(PROMPTS * 12, PARAMS)
    assert backend.refresh().steps > 0


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


@pytest.mark.parametrize("young_or_old", ["hope", "slope"])
def test_a_gain_that_is_worth_nothing_ends_the_training(tmp_path, monkeypatch, young_or_old):
    monkeypatch.setattr(RolloutValue, young_or_old, lambda self, rates: 0.0)
    monkeypatch.setattr(learner, "YOUNG_STEPS", 1000 if young_or_old == "hope" else 0)
    backend = backend_for("llama", tmp_path, gamma=None)
    backend.generate(PROMPTS * 4, PARAMS)
    assert backend.refresh().steps == FIRST_BURST
    assert backend.learner.budget.wish == 0


@pytest.mark.parametrize(("remaining", "goes_on"), [(9, True), (2, False)])
def test_a_young_head_must_repay_all_the_steps_to_come(tmp_path, monkeypatch, remaining, goes_on):
    """5 s saved in each rollout to come, against the 30 steps of 1 s that are left after 130."""
    monkeypatch.setattr(RolloutValue, "hope", lambda self, rates: 5.0)
    monkeypatch.setattr(learner, "YOUNG_STEPS", 160)
    backend = backend_for("llama", tmp_path, gamma=None)
    backend.generate(PROMPTS * 4, PARAMS)
    backend.learner.trainer.steps = 130 - BURST
    judged = []
    train = DraftTrainer.train

    def judging(self, buffer, seconds, worth=None, temperature=1.0):
        self.step_seconds = 0.0  # so that it begins

        def judge(before, after):
            self.step_seconds = 1.0
            judged.append(worth(before, after))
            return 0.0

        return train(self, buffer, seconds, judge, temperature)

    monkeypatch.setattr(DraftTrainer, "train", judging)
    backend.refresh(remaining=remaining)
    assert judged == [5.0 * remaining - 30.0] and (judged[0] > 0) == goes_on


def test_a_head_that_did_not_pay_is_trained_again_once_it_has_saved_enough(tmp_path):
    backend = learned("llama", tmp_path, draft_overhead=0.05)
    budget = backend.learner.budget
    budget.elapsed, budget.spent, budget.wish = 1000.0, 0.0, 0.0  # funds enough, but the last one did not pay
    budget.earn = lambda seconds: RefreshBudget.earn(budget, 10.0)
    steps = []
    for turn in range(6):
        backend.learner.trainer.step_seconds = 0.2  # more than the least share of one phase, 0.0625 s
        backend.generate(PROMPTS, PARAMS, seed=(turn,))
        steps.append(backend.refresh().steps)
    assert steps[:2] == [0, 0] and any(steps)


def test_a_head_from_another_run_brings_no_budget_and_no_tables(tmp_path):
    backend = learned("llama", tmp_path, gamma=None)
    backend.generate(PROMPTS, PARAMS)
    backend.save(tmp_path / "draft")
    other = backend_for("llama", tmp_path, None, draft_model_path=str(tmp_path / "draft"))
    assert other.learner.budget.spent == 0 and other.head.state_dict() is None
    assert other.learner.trained and other.learner.fitted
    other.load(tmp_path / "draft")
    assert other.learner.budget.spent > 0 and other.head.state_dict() is not None


def test_a_resumed_head_trains_on_as_one_that_went_on(tmp_path):
    """Optimiser, random stream, version and budget come back; the features of the next rollout serve both."""
    backend = learned("llama", tmp_path)
    backend.save(tmp_path / "draft")
    other = backend_for("llama", tmp_path)
    other.load(tmp_path / "draft")
    assert vars(other.learner.budget) == vars(backend.learner.budget)
    assert other.learner.acceptance == backend.learner.acceptance != []
    backend.learner.buffer.samples.clear()  # nothing that only one of them has
    for one in (backend, other):
        one.generate(PROMPTS * 2, PARAMS, seed=(5,))
        assert one.refresh(1e9).steps > 0
    for (name, ours), theirs in zip(
        backend.learner.head.named_parameters(), other.learner.head.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
