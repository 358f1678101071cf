"""Asynchronous GRPO end to end: a server, a process that rolls out, and a trainer that pushes meanwhile."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from spec_rollout.backends.vllm.key import KEY
from spec_rollout.config import SpecConfig
from tests.backends.vllm.tiny import needs_vllm

pytest.importorskip("trl.experimental.async_grpo")

from spec_rollout.training import SpecAsyncGRPOConfig, SpecAsyncGRPOTrainer
from spec_rollout.training.async_grpo.transfer import PushTransfer
from spec_rollout.training.async_grpo.worker import told
from tests.training.asynchronous import OPTIONS, SECRET, Run, digits, make_trainer, served_policy


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with served_policy(tmp_path_factory.mktemp("async")) as served:
        yield served


@pytest.fixture(scope="module")
def run(served, tmp_path_factory):
    policy, process = served
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY, SECRET)
        patch.setattr("spec_rollout.draft.budget.RefreshBudget.seconds", lambda self, *_: 1.0)
        patch.setattr("spec_rollout.draft.refresh.MAX_EPOCHS", 20)
        run = Run(make_trainer(policy, process.url, tmp_path_factory.mktemp("run")), policy, patch)
        run.trainer.train()
    return run


@needs_vllm
def test_log_probs_are_those_of_the_versions_that_a_completion_names(run):
    assert run.trainer.state.global_step == OPTIONS["max_steps"] and len(run.policies) == OPTIONS["max_steps"] + 1
    assert all(run.check_versions())
    assert all(sample.versions[0][-1][1] >= sample.model_version for sample in run.samples)


@needs_vllm
def test_completions_are_those_of_the_embedded_engine(run):
    assert run.check_completions()


@needs_vllm
def test_what_is_logged(run):
    trainer = run.trainer
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    versions = [entry["speculative/draft_version"] for entry in log]
    assert versions == sorted(versions) and versions[-1] >= 1  # how often it learns depends on what a step takes
    assert max(entry["speculative/mean_acceptance_length"] for entry in log) > 1.1
    assert log[-1]["speculative/policy_version_newest"] > log[0]["speculative/policy_version_oldest"]
    assert trainer.transfer.backend.draft_healthy and not trainer.transfer.backend.delivery.lost
    assert all(abs(entry["ratio"] - 1) < 0.5 for entry in log)


@needs_vllm
def test_another_key_is_told_at_once(served, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, SECRET[::-1])
    with pytest.raises(PermissionError, match="does not take this trainer's key"):
        make_trainer(*served_at(served), tmp_path).train()


@needs_vllm
def test_other_numbers_of_guesses_are_told_at_once(served, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    with pytest.raises(ValueError, match="started to guess 3"):
        make_trainer(*served_at(served), tmp_path, num_speculative_tokens=0).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_backend": "embedded"}, "set it to 'vllm'"),
        ({"temperature": 0.0}, "number above 0"),
        ({"min_p": 0.1, "verification": "rejection"}, "rejection sampling"),
        ({"calibration_cache": "x"}, "leave it out"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SpecAsyncGRPOConfig(str(tmp_path), **OPTIONS | options)


@pytest.mark.parametrize("name", ["rollout_worker", "weight_transfer", "peft_config", "eval_dataset"])
def test_an_argument_that_cannot_be_honoured_is_refused(name, tmp_path):
    args = SpecAsyncGRPOConfig(str(tmp_path), **OPTIONS)
    with pytest.raises(ValueError, match=f"{name} cannot be honoured"):
        SpecAsyncGRPOTrainer("nowhere", digits, args, **{name: object()})


def test_a_server_that_tells_no_versions_or_holds_no_pushed_policy_is_noticed():
    with pytest.raises(RuntimeError, match="spec-rollout serve"):
        told({"versions": None}, "http://there")
    with pytest.raises(ConnectionResetError, match="that it was started with"):
        told({"versions": [[0, 0, 0]]}, "http://there")
    assert told({"versions": [[0, 1, 1], [5, 2, 2]]}, "http://there")[1] == [5, 2, 2]


def served_at(served) -> tuple[Path, str]:
    return served[0], served[1].url


def test_an_mtp_head_is_refused():
    with pytest.raises(ValueError, match="draft_head='mtp' was not tested with asynchronous GRPO"):
        PushTransfer().attach(SimpleNamespace(args=None), SpecConfig(draft_head="mtp"))
