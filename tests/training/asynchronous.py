"""Asynchronous GRPO on a tiny policy: its server, its trainer, and what was seen of a run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedModel

from spec_rollout.backends.vllm.key import KEY
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import SamplingParams
from spec_rollout.training import SpecAsyncGRPOConfig, SpecAsyncGRPOTrainer
from tests.backends.vllm.process import Process
from tests.backends.vllm.tiny import SIZES, save_policy
from tests.training.conftest import PROMPTS, build_tokenizer

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
    "vllm_server_timeout": 600.0,
    "max_slots": 16,
    "queue_maxsize": 16,
    "max_inflight_tasks": 16,
}
SECRET = "a-key-of-many-letters"


def digits(completion_ids, **given) -> list[float]:
    """In a process of its own, so at the top of a module."""
    return [sum(token >= 29 for token in ids) / len(ids) for ids in completion_ids]


@contextmanager
def served_policy(folder: Path) -> Iterator[tuple[Path, Process]]:
    """The folder of a random policy and its server."""
    tokenizer = build_tokenizer()
    save_policy(folder / "policy", "llama", **SIZES | {"vocab_size": len(tokenizer), "num_hidden_layers": 4})
    tokenizer.save_pretrained(folder / "policy")
    with served(folder) as process:
        yield folder / "policy", process


@contextmanager
def served(folder: Path) -> Iterator[Process]:
    """A server of the policy in `folder`, which wants a key."""
    process = Process(folder / "policy", folder / "log", environment={KEY: SECRET})
    try:
        yield process
    finally:
        process.kill()


def make_trainer(policy: Path, url: str, out: Path, reward: Callable = digits, **options: Any) -> SpecAsyncGRPOTrainer:
    given = {name: options.pop(name) for name in ("train_dataset", "tools") if name in options}
    args = SpecAsyncGRPOConfig(str(out), vllm_server_base_url=url, **OPTIONS | options)
    rows = {"train_dataset": Dataset.from_dict({"prompt": PROMPTS})}
    return SpecAsyncGRPOTrainer(str(policy), reward, args, **rows | given)


class Run:
    """What is seen of the run of `trainer`.

    Attributes:
        samples: that it took.
        policies: what the server held, by version.
    """

    def __init__(self, trainer: SpecAsyncGRPOTrainer, policy: Path, patch: pytest.MonkeyPatch):
        self.trainer, self.samples, self.policies = trainer, [], {}
        take, push = trainer.rollout_queue.get, trainer.transfer.send_weights

        def get(**options):
            self.samples.append(take(**options))
            return self.samples[-1]

        def send(iterator=None):
            push(iterator)
            held = LlamaForCausalLM.from_pretrained(policy)
            held.load_state_dict(trainer.model.state_dict())
            self.policies[trainer.transfer.server().versions()[0]] = held

        patch.setattr(trainer.rollout_queue, "get", get)
        patch.setattr(trainer.transfer, "send_weights", send)

    def check_versions(self) -> list[bool]:
        """Log-probs are those of the versions that a completion names, turn by turn. Returns, of each range of tokens,
        whether all other policies have others; a server that was killed is pushed the same one again."""
        found = []
        for sample in self.samples:
            ids, drawn = torch.tensor(sample.input_ids), torch.tensor(sample.completion_mask)
            borders = (drawn.diff(prepend=drawn.new_zeros(1)) == 1).nonzero()[:, 0].tolist()
            assert len(borders) == len(sample.versions)
            for begin, ranges in zip(borders, sample.versions, strict=True):
                end = begin + int(drawn[begin:].cumprod(0).sum())
                starts = [begin + first for first, *_ in ranges]
                assert starts[0] == begin
                for (_, policy, draft), start, stop in zip(ranges, starts, [*starts[1:], end], strict=True):
                    assert policy == draft >= 1
                    told = torch.tensor(sample.old_log_probs)[start:stop]
                    found.append(self._check_drawn_by(policy, ids[:stop], told))
        return found

    def _check_drawn_by(self, version: int, ids: torch.Tensor, told: torch.Tensor) -> bool:
        own = scored(self.policies[version], ids)[-len(told) :]
        torch.testing.assert_close(own, told, atol=1e-3, rtol=0)
        others = [scored(policy, ids)[-len(told) :] for policy in self.policies.values()]
        return min((own - other).abs().max() for other in others if not torch.equal(own, other)) > 1e-3

    def check_completions(self, first: int = 0) -> int:
        """Completions of one turn that one version has drawn are the embedded engine's: they follow from the seed, the
        prompt's place and the number among its siblings. Returns how many groups there were.

        Args:
            first: the place of the first prompt.
        """
        groups, args, compared = defaultdict(list), self.trainer.args, 0
        for sample in self.samples:
            groups[sample.group_id].append(sample)
        params = SamplingParams(max_new_tokens=args.max_completion_length, eos_token_ids=self.trainer.eos_token_ids)
        for number, group in groups.items():
            versions = {policy for sample in group for _, policy, _ in sample.versions[0]}
            if len(versions) > 1:
                continue
            begin = int(group[0].completion_mask.argmax())
            prompt, engine = group[0].input_ids[:begin].tolist(), RolloutEngine(self.policies[versions.pop()])
            seeds = [(args.seed, 1, first + number, place, 0) for place in range(args.num_generations)]
            own = [engine.generate([prompt], params, seed=seed)[0].token_ids for seed in seeds]
            drawn = [sample.input_ids[begin:].tolist() for sample in group]
            assert not Counter(map(tuple, drawn)) - Counter(map(tuple, own)) and len({*map(tuple, own)}) > 1
            compared += 1
        return compared


def scored(policy: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The log-prob of each token of `ids` [T] but the first, which has 0."""
    with torch.no_grad():
        logprobs = policy(ids[None]).logits[0, :-1].log_softmax(-1)
    return torch.cat([torch.zeros(1), logprobs.gather(1, ids[1:, None])[:, 0]])
