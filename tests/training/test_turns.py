"""A trainer's tool loop reads only what is new, and no memory is held while it trains."""

from __future__ import annotations

from spec_rollout.engine.beginnings import Beginning, Beginnings
from spec_rollout.training import SpecGRPOTrainer
from tests.training.talking import logged
from tests.training.test_grpo import assert_same, trained
from tests.training.test_tools import CHATS, GOOD, TALK, multiply


def test_a_turn_reads_what_is_new(make_talking, monkeypatch):
    """What is kept from turn to turn changes nothing of what is learned, and is gone before anything is trained."""
    held = []
    loss = SpecGRPOTrainer._compute_loss

    def compute_loss(self, model, inputs):
        held.append(self.sampler.backend.engine.kept_rows)
        assert len(held[-1]) == 0 == held[-1].bytes
        return loss(self, model, inputs)

    monkeypatch.setattr(SpecGRPOTrainer, "_compute_loss", compute_loss)
    given = {"train_dataset": CHATS, "tools": [multiply], "options": {"max_steps": 2}}
    reusing = trained(make_talking(GOOD, TALK, **given))
    assert len(held) == 2 and held[0] is not None
    tokens = {name: sum(logged(reusing, f"speculative/{name}_tokens")) for name in ("prefilled", "reused")}
    monkeypatch.setattr(Beginnings, "find", lambda self, request: Beginning())
    whole = trained(make_talking(GOOD, TALK, **given))
    assert_same(reusing, whole)
    assert sum(logged(whole, "speculative/prefilled_tokens")) > 2 * tokens["prefilled"] < tokens["reused"]


def test_a_trainer_without_tools_keeps_nothing(make_talking):
    trainer = trained(make_talking(TALK, ("Done",), train_dataset=CHATS))
    assert trainer.sampler.backend.engine.kept_rows is None
