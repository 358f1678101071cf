"""Checkpoints carry the draft, and a resumed run ends where the uninterrupted one does."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.test_grpo import assert_same, trained

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@pytest.mark.parametrize("gamma", [0, 2])
def test_a_resumed_run_is_the_uninterrupted_one(make_trainer, eager_head, gamma):
    whole = trained(make_trainer(num_speculative_tokens=gamma, **SAVING))
    checkpoint = Path(whole.args.output_dir, "checkpoint-2")
    assert (checkpoint / "draft").is_dir() == (gamma > 0)
    resumed = trained(make_trainer(num_speculative_tokens=gamma, **SAVING), resume_from_checkpoint=str(checkpoint))
    whole.reward_funcs[0].seen = whole.reward_funcs[0].seen[2:]
    assert_same(whole, resumed)


KILLED = """
import os, signal, sys
import spec_rollout.draft.checkpoint as checkpoint
from datasets import Dataset
from transformers import TrainerCallback
from tests.training.conftest import OPTIONS, PROMPTS, Digits, build_policy, build_tokenizer
from tests.training.test_grpo_checkpoint import SAVING
from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            if sys.argv[2] == "step":
                os.kill(os.getpid(), signal.SIGKILL)
            checkpoint.save_file = die

def die(tensors, path):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

tokenizer = build_tokenizer()
args = SpecGRPOConfig(sys.argv[1], num_speculative_tokens=2, calibration_cache=sys.argv[1], **(OPTIONS | SAVING))
rows = Dataset.from_dict({"prompt": PROMPTS})
policy = build_policy(tokenizer)
SpecGRPOTrainer(policy, Digits(), args, rows, processing_class=tokenizer, callbacks=[Kill()]).train()
"""


@pytest.mark.parametrize(("moment", "left"), [("step", [2]), ("save", [2, 4])])
def test_kill_9_and_resume(make_trainer, eager_head, tmp_path, moment, left):
    """In mid-training, or half-way through the draft of the second checkpoint: the first one serves."""
    whole = trained(make_trainer(**SAVING))
    run = tmp_path / "killed"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(run), moment], cwd=Path(__file__).parents[2])
    assert ended.returncode == -signal.SIGKILL
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in left]
    assert [path.parent.name for path in run.glob("checkpoint-*/draft")] == ["checkpoint-2"]
    resumed = trained(make_trainer(**SAVING), resume_from_checkpoint=str(run / "checkpoint-2"))
    whole.reward_funcs[0].seen = whole.reward_funcs[0].seen[2:]
    assert_same(whole, resumed)


def test_the_draft_goes_on_where_it_was(make_trainer, peeking):
    whole = trained(make_trainer(**SAVING))
    checkpoint = Path(whole.args.output_dir, "checkpoint-2")
    resumed = trained(make_trainer(**SAVING), resume_from_checkpoint=str(checkpoint))
    assert resumed.sampler.backend.draft_version == whole.sampler.backend.draft_version == 4


def test_a_checkpoint_appears_complete_or_not_at_all(make_trainer, peeking, tmp_path, monkeypatch):
    sampler = trained(make_trainer()).sampler

    def fail(folder):
        Path(folder).mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(sampler.backend, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        sampler.save(tmp_path)
    assert not (tmp_path / "draft").exists()
    monkeypatch.undo()
    sampler.save(tmp_path)
    sampler.save(tmp_path)  # over the earlier one
    assert [path.name for path in tmp_path.glob("*draft*")] == ["draft"]


def test_a_draft_waits_for_the_backend_and_survives_saving_before_it(make_trainer, peeking, tmp_path):
    trained(make_trainer()).sampler.save(tmp_path / "first")
    later = make_trainer()
    later.sampler.load(tmp_path / "first")
    later.sampler.save(tmp_path / "second")
    assert (tmp_path / "second" / "draft" / "version").read_text() == "3"
    trained(later)
    assert later.sampler.backend.draft_version == 6


def test_a_checkpoint_without_a_draft_is_said_to_be_one(make_trainer, peeking, tmp_path):
    with pytest.warns(UserWarning, match="holds no draft"):
        make_trainer(num_speculative_tokens=2).sampler.load(tmp_path)
