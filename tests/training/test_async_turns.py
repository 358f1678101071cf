"""Asynchronous GRPO with a tool: conversations of several turns, each with its versions."""

import asyncio
import itertools
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.backends.vllm.tiny import needs_vllm

pytest.importorskip("trl.experimental.async_grpo")

from spec_rollout.backends.vllm.hold import COMPLETIONS
from spec_rollout.backends.vllm.key import KEY
from spec_rollout.training.async_grpo.worker import UNDER_WAY, Conversation, SpecRolloutLoop, _AsyncRolloutLoop
from tests.training import tooled
from tests.training.asynchronous import SECRET, Run, make_trainer, served
from tests.training.test_tools import CHATS

PUSHES = "TEST_PUSHES"
RESPONSE = "<<unk>>\n<unk>\n</<unk>>"
"""Of the tool, as the small vocabulary has it."""
CALLS = itertools.count()


def multiply(a: int, b: int) -> int:
    """
    Multiplies two numbers. The first call waits for the second push.

    Args:
        a: The first.
        b: The second.

    Returns:
        Their product.
    """
    if next(CALLS) == 0:
        while len(Path(os.environ[PUSHES]).read_text()) < 2:
            time.sleep(0.1)
    return a * b


def turns(completions, **given) -> list[float]:
    return [float(len(completion)) for completion in completions]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has seen a conversation which went through a push between two of its turns."""
    folder = tmp_path_factory.mktemp("async")
    policy = tooled.save_policy(folder / "policy")
    with pytest.MonkeyPatch.context() as patch, served(folder) as process:
        patch.setenv(KEY, SECRET)
        patch.setenv(PUSHES, str(folder / "pushes"))
        patch.setattr("spec_rollout.draft.budget.RefreshBudget.seconds", lambda self, *_: 1e9)
        patch.setattr("spec_rollout.draft.refresh.MAX_EPOCHS", 20)
        patch.setattr("spec_rollout.draft.watchman.WATCHED", 10**9)
        given = {"max_tool_calling_iterations": 2, "max_steps": 4, "max_staleness": 10**6, "learning_rate": 1e-3}
        given |= {"reward": turns, "train_dataset": CHATS, "tools": [multiply]}
        trainer = make_trainer(policy, process.url, folder / "run", **given)
        run = Run(trainer, policy, patch)
        take, crossed = trainer.rollout_queue.get, []

        def get(**options):
            sample = take(**options)
            while trainer.state.global_step == 3 and not crossed:
                crossed.extend([sample] * (len({turn[0][1] for turn in sample.versions}) > 1))
                sample = sample if crossed else take(**options)
            return sample

        def resume():
            with (folder / "pushes").open("a") as pushes:
                pushes.write(".")

        patch.setattr(trainer.rollout_queue, "get", get)
        patch.setattr(trainer.transfer, "resume", resume)
        trainer.train()
    return run


@needs_vllm
def test_each_turn_names_its_versions(run):
    assert run.trainer.state.global_step == 4
    assert any(run.check_versions())
    counts = {len(sample.versions) for sample in run.samples}
    assert counts >= {1, 2}
    assert any(len({turn[0][1] for turn in sample.versions}) > 1 for sample in run.samples)


@needs_vllm
def test_what_the_tool_said_is_read_and_not_learned(run):
    tokenizer, said = run.trainer.processing_class, 0
    for sample in run.samples:
        answers = [turn["content"] for turn in sample.completion if turn["role"] == "tool"]
        assert answers == ["12"] * len(answers)
        read = tokenizer.decode(sample.input_ids[sample.completion_mask == 0])
        assert read.count(RESPONSE) == len(answers)
        said += len(answers)
    log = [entry for entry in run.trainer.state.log_history if "loss" in entry]
    assert said and max(entry["rollout/turns_max"] for entry in log if "rollout/turns_max" in entry) > 1
    assert max(entry["speculative/mean_acceptance_length"] for entry in log) > 1.5


@needs_vllm
def test_plain_text_beside_tools_is_refused(tmp_path):
    policy = tooled.save_policy(tmp_path / "policy")
    with pytest.raises(ValueError, match="give conversations"):
        make_trainer(policy, "http://nowhere", tmp_path, tools=[multiply])


def test_a_conversation_that_outgrows_the_context_ends_the_run_at_once(monkeypatch):
    aiohttp = pytest.importorskip("aiohttp")

    async def refuse(path, status):
        raise aiohttp.ClientResponseError(SimpleNamespace(real_url=path), (), status=status)

    monkeypatch.setattr(_AsyncRolloutLoop, "_post", lambda self, path, *given: refuse(path, self.status))
    loop = object.__new__(SpecRolloutLoop)
    loop.vllm_server_url, loop.coupled, loop.max_tokens = "http://there", False, 40
    UNDER_WAY.set(Conversation((0,), turns=[[[0, 1, 1]]]))
    for status, error, message in (
        (400, ValueError, "60 prompt tokens .*=40 in turn 2 .* larger --max-model-len"),
        (503, aiohttp.ClientResponseError, "503"),
    ):
        loop.status = status
        with pytest.raises(error, match=message):
            asyncio.run(loop._post(COMPLETIONS, {"prompt": [1] * 60}, 1.0))
