"""Tools on vLLM: a loop of several turns in the trainer's process, and on a server with one process and with two."""

import pytest

from spec_rollout.backends.vllm.colocated import engine_options
from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer
from tests.backends.vllm.process import Process
from tests.backends.vllm.tiny import needs_vllm
from tests.training import tooled
from tests.training.conftest import OPTIONS
from tests.training.processes import torchrun

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tooled.save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def server(policy, tmp_path_factory):
    process = Process(policy, tmp_path_factory.mktemp("server") / "log", "--num_speculative_tokens", "2")
    yield process.url
    process.kill()


def trained(policy, folder, **options) -> SpecGRPOTrainer:
    args = SpecGRPOConfig(str(folder), **OPTIONS | tooled.OPTIONS | options)
    trainer = tooled.make_trainer(policy, args)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def embedded(policy, tmp_path_factory):
    """The embedded engine's run without guesses."""
    return trained(policy, tmp_path_factory.mktemp("plain"), num_speculative_tokens=0)


def check(trainer, embedded) -> None:
    reward = trainer.reward_funcs[0]
    assert reward.seen == embedded.reward_funcs[0].seen
    answers = [turn["content"] for turns in reward.turns for turn in turns if turn["role"] == "tool"]
    assert answers and {*answers} == {"12"}
    assert {len(turns) for turns in reward.turns} == {1, 3, 5}
    check_log(trainer.state.log_history)


def check_log(history: list[dict]) -> None:
    log = [entry for entry in history if "reward" in entry]
    # what tools said is left out
    assert max(entry["sampling/sampling_logp_difference/max"] for entry in log) < 1e-3
    assert max(entry["speculative/mean_acceptance_length"] for entry in log) > 1.5
    assert min(entry["speculative/draft_healthy"] for entry in log) == 1


def test_in_the_trainers_process(policy, embedded, tmp_path, monkeypatch, eager_head):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    quick = {"enforce_eager": True}
    monkeypatch.setattr("spec_rollout.training.vllm.engine_options", lambda draft: engine_options(draft) | quick)
    check(trained(policy, tmp_path, rollout_backend="vllm", max_slots=8), embedded)


def test_on_a_server(policy, embedded, server, tmp_path, eager_head):
    served = {"rollout_backend": "vllm", "vllm_mode": "server", "vllm_server_base_url": server}
    check(trained(policy, tmp_path, **served), embedded)


def test_a_rank_that_has_no_more_turns_waits_for_the_other(policy, server, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("POLICY", str(policy))
    monkeypatch.setenv("SERVER", server)
    run = {}
    for kind in ("ddp+tools", "ddp+tools+embedded"):
        ranks = torchrun("tests.training.server_ranks", kind, tmp_path_factory.mktemp(kind))
        run[kind] = [rank["digits"] for rank in ranks]
    served, embedded = run.values()
    assert [rank["seen"] for rank in served] == [rank["seen"] for rank in embedded]
    assert [max(rank["turns"]) for rank in served] == [7, 3]
    check_log(served[0]["log"])
