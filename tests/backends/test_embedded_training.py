"""When the head of an embedded backend is trained, and when that ends."""

import pytest
import torch

from spec_rollout.draft import learner, refresh
from spec_rollout.draft.budget import RefreshBudget
from spec_rollout.draft.refresh import BURST, FIRST_BURST, DraftTrainer
from spec_rollout.gamma.saving import RolloutValue
from tests.backends.learned import PARAMS, backend_for, learned, plain
from tests.tiny import PROMPTS, assert_same

pytestmark = pytest.mark.usefixtures("generous")


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
        trainer = backend.learner.trainer
        trainer.step_seconds, trainer.look_seconds = 0.2, 0.0  # more than the least share of one phase, 0.0625 s
        backend.generate(PROMPTS, PARAMS, seed=(turn,))
        steps.append(backend.refresh().steps)
    assert steps[:2] == [0, 0] and any(steps)


def test_a_training_that_could_do_little_but_look_does_not_begin(tmp_path, monkeypatch):
    """Two looks and one step would fit; they would cost time in each phase and teach next to nothing."""
    backend = learned("llama", tmp_path)
    backend.generate(PROMPTS, PARAMS)
    trainer = backend.learner.trainer
    trainer.step_seconds, trainer.look_seconds = 1.0, 1.0
    looks = []
    acceptance = DraftTrainer.acceptance
    monkeypatch.setattr(DraftTrainer, "acceptance", lambda *given: looks.append(1) or acceptance(*given))
    assert backend.refresh(4.5).steps == 0 and not looks
    assert backend.refresh(5.5).steps > 0 and len(looks) >= 2
    assert trainer.look_seconds < 1.0


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
