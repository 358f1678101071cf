"""Asynchronous GRPO end to end: a server, a process that rolls out, and a trainer that pushes meanwhile."""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from spec_rollout.backends.vllm.key import KEY
from spec_rollout.config import SpecConfig
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import SamplingParams
from tests.backends.vllm.process import Process
from tests.backends.vllm.tiny import SIZES, needs_vllm, save_policy
from tests.training.conftest import PROMPTS, build_tokenizer

pytest.importorskip("trl.experimental.async_grpo")

from spec_rollout.training import SpecAsyncGRPOConfig, SpecAsyncGRPOTrainer
from spec_rollout.training.async_grpo.transfer import PushTransfer
from spec_rollout.training.async_grpo.worker import told

OPTIONS = {
    "bf16": False,
    "use_cpu": True,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 40,
    "learning_rate": 1e-3,
    "max_steps": 6,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "token_budget": 0,
    "gradient_checkpointing": False,
    "num_speculative_tokens": 3,
    "vllm_server_timeout": 120.0,
    "max_slots": 16,
    "queue_maxsize": 16,
    "max_inflight_tasks": 16,
}
SECRET = "a-key-of-many-letters"


def digits(completion_ids, **given) -> list[float]:
    """In a process of its own, so at the top of a module."""
    return [sum(token >= 29 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The policy's folder and its server, which wants a key."""
    folder = tmp_path_factory.mktemp("async")
    tokenizer = build_tokenizer()
    save_policy(folder / "policy", "llama", **SIZES | {"vocab_size": len(tokenizer), "num_hidden_layers": 4})
    tokenizer.save_pretrained(folder / "policy")
    process = Process(folder / "policy", folder / "log", environment={KEY: SECRET})
    yield folder / "policy", process
    process.kill()


def make_trainer(policy: Path, url: str, out: Path, **options) -> SpecAsyncGRPOTrainer:
    args = SpecAsyncGRPOConfig(str(out), vllm_server_base_url=url, **OPTIONS | options)
    rows = Dataset.from_dict({"prompt": PROMPTS})
    return SpecAsyncGRPOTrainer(str(policy), digits, args, train_dataset=rows)


@pytest.fixture(scope="module")
def run(served, tmp_path_factory):
    """A trainer that has been through its steps, the samples that it took, and the policy of each version."""
    policy, process = served
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY, SECRET)
        patch.setattr("spec_rollout.draft.budget.RefreshBudget.seconds", lambda self, *_: 1.0)
        patch.setattr("spec_rollout.draft.refresh.MAX_EPOCHS", 20)
        trainer = make_trainer(policy, process.url, tmp_path_factory.mktemp("run"))
        policies, samples = {}, []
        take, push = trainer.rollout_queue.get, trainer.transfer.send_weights

        def get(**options):
            samples.append(take(**options))
            return samples[-1]

        def send(iterator=None):
            push(iterator)
            held = LlamaForCausalLM.from_pretrained(policy)
            held.load_state_dict(trainer.model.state_dict())
            policies[trainer.transfer.server().versions()[0]] = held

        patch.setattr(trainer.rollout_queue, "get", get)
        patch.setattr(trainer.transfer, "send_weights", send)
        trainer.train()
    return trainer, samples, policies


@needs_vllm
def test_log_probs_are_those_of_the_versions_that_a_completion_names(run):
    trainer, samples, policies = run
    assert trainer.state.global_step == OPTIONS["max_steps"] and len(policies) == OPTIONS["max_steps"] + 1
    for sample in samples:
        ids, (ranges,) = torch.tensor(sample.input_ids), sample.versions
        begin = int(sample.completion_mask.argmax())
        starts = [begin + first for first, *_ in ranges]
        assert starts[0] == begin and ranges[-1][1] >= sample.model_version
        for (_, policy, draft), start, end in zip(ranges, starts, [*starts[1:], len(ids)], strict=True):
            assert policy == draft
            logprobs = scored(policies[policy], ids)[start:end]
            torch.testing.assert_close(logprobs, torch.tensor(sample.old_log_probs)[start:end], atol=1e-3, rtol=0)
            others = [scored(other, ids)[start:end] for name, other in policies.items() if name != policy]
            assert min((logprobs - other).abs().max() for other in others) > 1e-3


@needs_vllm
def test_completions_are_those_of_the_embedded_engine(run):
    """What one version has drawn follows from the seed, the prompt's place and the number among its siblings."""
    trainer, samples, policies = run
    groups = defaultdict(list)
    for sample in samples:
        groups[sample.group_id].append(sample)
    params = SamplingParams(max_new_tokens=OPTIONS["max_completion_length"], eos_token_ids=trainer.eos_token_ids)
    compared = 0
    for number, group in groups.items():
        versions = {policy for sample in group for _, policy, _ in sample.versions[0]}
        if len(versions) > 1:
            continue
        begin = int(group[0].completion_mask.argmax())
        prompt, engine = group[0].input_ids[:begin].tolist(), RolloutEngine(policies[versions.pop()])
        own = [
            engine.generate([prompt], params, seed=(trainer.args.seed, 1, number, i, 0))[0].token_ids for i in range(4)
        ]
        drawn = [sample.input_ids[begin:].tolist() for sample in group]
        assert all(tokens in own for tokens in drawn) and len({*map(tuple, drawn)}) > 1
        compared += 1
    assert compared


@needs_vllm
def test_what_is_logged(run):
    trainer = run[0]
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


def scored(policy, ids: torch.Tensor) -> torch.Tensor:
    """The log-prob of each token of `ids` [T] but the first, which has 0."""
    with torch.no_grad():
        logprobs = policy(ids[None]).logits[0, :-1].log_softmax(-1)
    return torch.cat([torch.zeros(1), logprobs.gather(1, ids[1:, None])[:, 0]])


def test_an_mtp_head_is_refused():
    with pytest.raises(ValueError, match="draft_head='mtp' was not tested with asynchronous GRPO"):
        PushTransfer().attach(SimpleNamespace(args=None), SpecConfig(draft_head="mtp"))
