"""`profile_rollouts` leaves a trace of every rollout in the output directory, and the same completions."""

from __future__ import annotations

from pathlib import Path

from spec_rollout.backends.trace import read_traces


def train(make_trainer, **options):
    trainer = make_trainer(**options)
    trainer.train()
    return trainer, trainer.reward_funcs[0].seen


def test_every_rollout_and_training_is_recorded(make_trainer, eager_head):
    _, expected = train(make_trainer)
    trainer, seen = train(make_trainer, profile_rollouts=True, num_speculative_tokens=None)
    assert seen == expected
    trace = read_traces([Path(trainer.args.output_dir, "rollouts", "rank-0.jsonl")])
    assert [r.labels for r in trace.rollouts] == [{"mode": "train", "step": s, "call": 0} for s in range(3)]
    assert [r["labels"]["step"] for r in trace.refreshes] == [0, 1, 2]
    assert [r.completion_tokens for r in trace.rollouts] == [[len(ids) for ids in step] for step in seen]
    assert all(cost["measurements"] for cost in trace.costs.values()) and trace.costs


def test_without_it_nothing_is_written(make_trainer):
    trainer, _ = train(make_trainer, max_steps=1)
    assert not Path(trainer.args.output_dir, "rollouts").exists()
    assert trainer.sampler.backend.engine.recorder is None


def test_a_new_run_in_the_same_place_begins_a_new_file(make_trainer):
    for _ in range(2):
        trainer, _ = train(make_trainer, max_steps=1, profile_rollouts=True)
    lines = Path(trainer.args.output_dir, "rollouts", "rank-0.jsonl").read_text().splitlines()
    assert len(lines) == 2
