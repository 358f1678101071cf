"""GRPO on the arithmetic task, as the demo and the drift experiment run it."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import GRPOTrainer

from spec_rollout.bench.workload import Policy
from spec_rollout.records import Completion
from spec_rollout.tasks.arithmetic import VARIED, Style, accuracy_reward, problems, prompt_dataset
from spec_rollout.training import SpecGRPOConfig

BATCH_SIZE, GENERATIONS, COMPLETION_TOKENS = 48, 8, 320
PROBLEMS = 2000


class Progress(TrainerCallback):
    """One bar over the steps of a run, with the reward beside it."""

    def __init__(self, name: str):
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc=self.name, unit="step", file=sys.stderr)

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs):
        if logs and "reward" in logs:
            self.step_logged(logs)
            self.bar.set_postfix(reward=f"{logs['reward']:.2f}")
            self.bar.update()

    def step_logged(self, logs: dict[str, Any]) -> None:
        """For subclasses that keep figures of each step."""

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def make_trainer(
    trainer_class: type[GRPOTrainer],
    policy: str | Path,
    folder: Path,
    progress: Progress,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    reward: Callable[..., list[float]] = accuracy_reward,
    batch_size: int | None = None,
    generations: int | None = None,
    style: Style = VARIED,
    **options,
) -> GRPOTrainer:
    """A trainer of `trainer_class` for `steps` GRPO steps from the weights in `policy`, silent but for `progress`."""
    options = {"max_completion_length": COMPLETION_TOKENS} | options
    config = SpecGRPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        seed=seed,
        per_device_train_batch_size=batch_size or BATCH_SIZE,
        num_generations=generations or GENERATIONS,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        beta=0.0,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    trainer = trainer_class(
        model=str(policy),
        reward_funcs=reward,
        args=config,
        train_dataset=prompt_dataset("rl", PROBLEMS, seed, style),
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def accuracy(policy: Policy, completions: Sequence[Completion], seed: int = 0, style: Style = VARIED) -> float:
    """Share of right answers among the `completions` of as many held-out problems (`workload.arithmetic_prompts`)."""
    texts = [policy.tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
    return statistics.mean(accuracy_reward(texts, [p.answer for p in problems("heldout", len(texts), seed, style)]))
