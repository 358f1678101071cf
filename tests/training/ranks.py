"""What one of several processes does: trains the tiny policy with and without speculation, and writes what it saw.

torchrun --nproc_per_node 2 -m tests.training.ranks KIND FOLDER
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from datasets import Dataset

from spec_rollout.draft import refresh
from spec_rollout.draft.budget import RefreshBudget
from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer
from tests.training import talking
from tests.training.conftest import OPTIONS, PROMPTS, Digits, build_policy, build_tokenizer
from tests.training.processes import KINDS, join, report
from tests.training.talking import Length
from tests.training.test_tools import CHATS, GOOD, TALK, multiply


def main(kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    refresh.MAX_EPOCHS = 8  # these rollouts are short
    RefreshBudget.seconds = lambda self, *_: 1e9
    join(kind)
    figures = {f"gamma {gamma}": plain_run(kind, folder, gamma) for gamma in (0, 2)}
    if kind in ("fsdp2", "zero3"):
        figures["tools"] = tool_run(kind, folder)
    report(folder, figures)


def plain_run(kind: str, folder: Path, gamma: int) -> dict:
    tokenizer = build_tokenizer()
    saving = {"save_strategy": "steps", "save_steps": 2} if gamma else {}
    args = config(kind, folder / f"gamma{gamma}", num_speculative_tokens=gamma, max_slots=3, max_steps=2, **saving)
    rows = Dataset.from_dict({"prompt": PROMPTS})
    trainer = SpecGRPOTrainer(build_policy(tokenizer), Digits(), args, rows, processing_class=tokenizer)
    steps, seconds = counted_steps(trainer), noted_seconds(trainer)
    trainer.train()
    return report_of(trainer) | {"seen": trainer.reward_funcs[0].seen, "steps": steps, "seconds": seconds}


def tool_run(kind: str, folder: Path) -> dict:
    """The first rank may go on calling tools where the second has to stop: they take unlike numbers of turns."""
    tokenizer = talking.make_tokenizer(GOOD, TALK)
    args = config(
        kind,
        folder / "tools",
        num_speculative_tokens=2,
        max_steps=1,
        max_completion_length=250,
        max_tool_calling_iterations=3 if PartialState().process_index == 0 else 1,
    )
    policy = talking.make_policy(tokenizer, GOOD, TALK)
    trainer = SpecGRPOTrainer(policy, Length(), args, CHATS, processing_class=tokenizer, tools=[multiply])
    steps = counted_steps(trainer)
    trainer.train()
    return report_of(trainer) | {"turns": len(steps)}


def config(kind: str, folder: Path, **options) -> SpecGRPOConfig:
    chosen = {name: value for name, value in OPTIONS.items() if name != "use_cpu"} | KINDS[kind] | options
    return SpecGRPOConfig(str(folder), calibration_cache=str(folder), gradient_checkpointing=False, **chosen)


def counted_steps(trainer: SpecGRPOTrainer) -> list[int]:
    """Fills with the number of decode steps of each call of the sampler."""
    steps: list[int] = []
    sample = trainer.sampler.sample

    def counting(*given, **options):
        before = len(trainer.sampler.backend.stats.steps) if trainer.sampler.backend else 0
        completions = sample(*given, **options)
        steps.append(len(trainer.sampler.backend.stats.steps) - before)
        return completions

    trainer.sampler.sample = counting
    return steps


def noted_seconds(trainer: SpecGRPOTrainer) -> list[float]:
    """Fills with what each generation phase took on this rank."""
    seconds: list[float] = []
    log = trainer.sampler.log

    def noting(trainer):
        seconds.append(trainer.sampler._seconds)
        log(trainer)

    trainer.sampler.log = noting
    return seconds


def report_of(trainer: SpecGRPOTrainer) -> dict:
    with trainer.sampler.gathered(trainer) as policy:
        weights = digest(policy)
    learner = trainer.sampler.backend.learner
    return {
        "weights": weights,
        "draft": digest(learner.head) if learner else None,
        "draft_version": trainer.sampler.backend.draft_version,
        "log": trainer.state.log_history,
        "kind": [trainer._dist.zero_stage, trainer._dist.fsdp_version, trainer.accelerator.num_processes],
    }


def digest(module: torch.nn.Module) -> str:
    weights = b"".join(bytes(w.detach().clone().view(torch.uint8).numpy()) for w in module.parameters())
    return hashlib.sha256(weights).hexdigest()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
