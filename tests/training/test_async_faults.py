"""Asynchronous GRPO in rough weather: weights over HTTP, a server that is killed, a run that is resumed."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.backends.vllm.tiny import needs_vllm

pytest.importorskip("trl.experimental.async_grpo")

from spec_rollout.backends.vllm.draft import draft_tensors
from spec_rollout.backends.vllm.key import KEY
from spec_rollout.backends.vllm.server import Server
from tests.training.asynchronous import SECRET, Run, make_trainer, served_policy

pytestmark = needs_vllm
STEPS = {"max_steps": 6, "weight_sync_steps": 3, "save_strategy": "steps", "save_steps": 3}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with served_policy(tmp_path_factory.mktemp("async")) as served:
        yield served


@pytest.fixture(scope="module")
def files():
    """Fills with those that were sent; trainers do not see the server's folder."""
    sent, find, send = [], Server._folder, Server._send_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY, SECRET)
        patch.setattr("spec_rollout.draft.budget.RefreshBudget.seconds", lambda self, *_: 1e9)
        patch.setattr("spec_rollout.draft.refresh.MAX_EPOCHS", 20)
        patch.setattr(Server, "_folder", lambda self: (None, find(self)[1]))
        patch.setattr(Server, "_send_file", lambda self, *given: sent.append(given[0]) or send(self, *given))
        yield sent


@pytest.fixture(scope="module")
def run(served, files, tmp_path_factory):
    """The server is killed behind the second push, while the trainer waits for completions."""
    policy, process = served
    with pytest.MonkeyPatch.context() as patch:
        trainer = make_trainer(policy, process.url, tmp_path_factory.mktemp("run"), **STEPS)
        run, killed = Run(trainer, policy, patch), []
        take, renew = trainer.rollout_queue.get, trainer.rollout_worker._starved

        def get(**options):
            """What was drawn before the server was killed is passed over, so that nothing is left."""
            if trainer.state.global_step == 4 and not killed:
                killed.append("in a rollout")
                process.kill()
                process.start()
            sample = take(**options)
            while len(killed) == 1:
                del run.samples[-1]
                sample = take(**options)
            return sample

        def renewing():
            known = len(run.policies)
            renew()
            if len(run.policies) > known:
                killed.append("renewed")

        patch.setattr(trainer.rollout_queue, "get", get)
        patch.setattr(trainer.rollout_worker, "_starved", renewing)
        trainer.train()
    assert killed == ["in a rollout", "renewed"]
    return run


def test_a_killed_server_is_given_the_weights_again_and_the_run_goes_on(run, files):
    assert run.trainer.state.global_step == STEPS["max_steps"]
    assert len(run.policies) == 3 + 1 and len(files) == 2 * len(run.policies)
    assert all(run.check_versions())
    drawn_by = {ranges[-1][1] for sample in run.samples for ranges in sample.versions}
    assert sorted(run.policies)[2] in drawn_by  # what was pushed again
    log = [entry for entry in run.trainer.state.log_history if "loss" in entry]
    assert sum(entry.get("rollout/vllm_retry_total", 0) for entry in log) > 0
    assert run.trainer.transfer.backend.draft_healthy


def test_what_is_drawn_follows_from_the_seed_all_the_same(run):
    assert run.check_completions()


def test_a_resumed_run_goes_on_from_its_prompt_with_its_draft(run, served, files, tmp_path, monkeypatch):
    policy, process = served
    checkpoint = Path(run.trainer.args.output_dir, "checkpoint-3")
    trainer = make_trainer(policy, process.url, tmp_path, **STEPS)
    resumed, pushed = Run(trainer, policy, monkeypatch), []
    send = trainer.transfer.send_weights
    monkeypatch.setattr(trainer.transfer, "send_weights", lambda *given: pushed.append(state(trainer)) or send(*given))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    saved = load_file(checkpoint / "draft" / "model.safetensors")["fc.weight"]
    assert [step for step, *_ in pushed] == [3, 6]
    assert pushed[0][1] >= 1 and pushed[0][2].equal(saved)
    first = trainer.rollout_worker._loop_kwargs["dataset_start_index"]
    assert first > 0 and min(resumed.policies) > max(run.policies)  # the server counts on
    assert all(resumed.check_versions())
    assert resumed.check_completions(first)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["speculative/mean_acceptance_length"] > 1


def state(trainer) -> tuple:
    """The step, and of the draft how often it has learned and a weight."""
    learner = trainer.transfer.backend.learner
    return trainer.state.global_step, learner.version, draft_tensors(learner)["fc.weight"].clone()
