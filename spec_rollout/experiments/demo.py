"""`spec-rollout demo`: GRPO on one seed with three samplers; reward, time, and the tokens compared."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging
from trl import GRPOTrainer

from spec_rollout.bench.workload import arithmetic_prompts, load_policy, positive, write_json
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.experiments import arithmetic_run
from spec_rollout.experiments.demo_report import compare, report
from spec_rollout.experiments.pictures import draw_demo
from spec_rollout.experiments.runs import Run
from spec_rollout.records import RolloutStats
from spec_rollout.tasks.arithmetic import problems
from spec_rollout.tasks.reference_policy import RECIPES, Size, make_reference_policy
from spec_rollout.training import SpecGRPOTrainer


@dataclass(frozen=True)
class Plan:
    """What a demo runs, and how long its parts took on 2 cores of an AMD EPYC on 2026-11-28, if that was measured."""

    size: Size
    """Of the policy (`reference_policy.RECIPES`)."""
    steps: int
    batch_size: int
    generations: int
    """Completions of each problem."""
    completion_tokens: int
    learning_rate: float
    heldout_problems: int
    policy_seconds: int | None = None
    step_seconds: tuple[float, float, float] | None = None
    """Of a step with TRL's sampler, with ours plain, and with ours."""


SHORT = Plan("demo", 72, 8, 4, 384, 1e-4, 96, 58, (1.0, 0.7, 0.6))
FULL = Plan("small", 20, 48, 8, 320, 1e-4, 256)
SAMPLERS = ("TRL's own sampler", "ours, plain decoding", "ours, speculative")


class Recorded:
    """Mixed into a trainer: notes what each generation drew and how long it and its draft training took."""

    run: Run

    def _generate(self, prompts: list):
        began = time.perf_counter()
        output = super()._generate(prompts)
        self.run.rollout_seconds.append(time.perf_counter() - began)
        self.run.completions.append(output[1])
        return output


class Baseline(Recorded, GRPOTrainer):
    """TRL's own trainer with its default sampler."""


class Speculative(Recorded, SpecGRPOTrainer):
    """Ours; also keeps the statistics of each rollout."""

    def _generate_single_turn(self, *args, **kwargs):
        output = super()._generate_single_turn(*args, **kwargs)
        self.run.stats.append(RolloutStats(list(self.sampler.backend.engine.stats.steps)))
        return output


class Clock(arithmetic_run.Progress):
    """Step times and rewards of a `run`."""

    def __init__(self, run: Run, name: str):
        super().__init__(name)
        self.run = run

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.run.step_seconds.append(time.perf_counter() - self.began)

    def step_logged(self, logs: dict[str, Any]) -> None:
        self.run.rewards.append(logs["reward"])


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    plan = FULL if args.full else SHORT
    plan = replace(plan, steps=args.steps or plan.steps)
    out = args.out or Path("demo-full" if args.full else "demo")
    announce(plan, out)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    policy = ready_policy(plan, out)
    baseline = train(SAMPLERS[0], Baseline, policy, plan, out, args.seed)
    plain = train(SAMPLERS[1], Speculative, policy, plan, out, args.seed, num_speculative_tokens=0)
    ours = train(SAMPLERS[2], Speculative, policy, plan, out, args.seed)
    figures = compare(baseline, plain, ours)
    figures |= heldout_accuracy(policy, plan, ours)
    draw_demo(out / "demo.png", baseline, plain, ours)
    write_json(args.json or out / "demo.json", figures)
    report(figures, out)
    return 0 if figures["identical_completions"] and figures["identical_weights"] else 1


def announce(plan: Plan, out: Path) -> None:
    """One line for each part that is to come."""
    made = (out / "policy" / "config.json").exists()
    policy = ": is there" if made else f"{_about(plan.policy_seconds)}, once"
    lines = [f"a small policy learns arithmetic from nothing, kept in {out / 'policy'}{policy}"]
    lines += [
        f"{plan.steps} steps of GRPO with {name}{_about(seconds and plan.steps * seconds)}"
        for name, seconds in zip(SAMPLERS, plan.step_seconds or (None,) * 3, strict=True)
    ]
    lines.append("held-out problems, table and picture")
    print("What comes, where it was measured with the time on 2 cores of an AMD EPYC:")
    for number, line in enumerate(lines, start=1):
        print(f"  {number}. {line}", flush=True)


def _about(seconds: float | None) -> str:
    return "" if seconds is None else f": about {seconds:.0f} s"


def ready_policy(plan: Plan, out: Path) -> Path:
    """The plan's policy, trained if it is not there yet; beside it prompts for the other commands.

    Raises:
        SystemExit: another policy is in its place.
    """
    folder, recipe = out / "policy", RECIPES[plan.size]
    if not (folder / "config.json").exists():
        make_reference_policy(folder, plan.size, seed=0)
    config = AutoConfig.from_pretrained(folder)
    if (config.num_hidden_layers, config.hidden_size) != (recipe.num_layers, recipe.hidden_size):
        raise SystemExit(f"{folder} holds a policy of another size: remove it, or give another --out.")
    prompts = (json.dumps({"prompt": p.prompt}) for p in problems("heldout", plan.heldout_problems, 1, recipe.style))
    (out / "prompts.jsonl").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return folder


def train(name: str, trainer_class: type, policy: Path, plan: Plan, out: Path, seed: int, **options) -> Run:
    """One GRPO run from the same weights, seed and prompts."""
    run = Run()
    trainer = arithmetic_run.make_trainer(
        trainer_class,
        policy,
        out / "runs" / name.replace(" ", "-").replace(",", "").replace("'", ""),
        Clock(run, name),
        steps=plan.steps,
        learning_rate=plan.learning_rate,
        seed=seed,
        batch_size=plan.batch_size,
        generations=plan.generations,
        max_completion_length=plan.completion_tokens,
        style=RECIPES[plan.size].style,
        **options,
    )
    trainer.run = run
    trainer.train()
    run.weights = {n: p.detach().cpu().clone() for n, p in trainer.model.named_parameters()}
    return run


def heldout_accuracy(folder: Path, plan: Plan, ours: Run) -> dict[str, float]:
    """Share of unseen problems that the policy gets right at T = 1 before and after our run.

    The prompts of a GRPO step are few and of uneven difficulty; this compares two policies on the same problems.
    """
    style = RECIPES[plan.size].style
    policy = load_policy(str(folder), "float32", plan.completion_tokens)
    prompts = arithmetic_prompts(policy.tokenizer, plan.heldout_problems, style=style)

    def right() -> float:
        completions = RolloutEngine(policy.model).generate(prompts, policy.params)
        return arithmetic_run.accuracy(policy, completions, style=style)

    first = right()
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            weight.copy_(ours.weights[name])
    return {
        "heldout_problems": plan.heldout_problems,
        "heldout_accuracy_first": first,
        "heldout_accuracy_last": right(),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spec-rollout demo", description=__doc__)
    parser.add_argument("--full", action="store_true", help="a larger policy and larger batches; takes longer")
    parser.add_argument("--out", type=Path, metavar="DIR", help="demo otherwise, and demo-full with --full")
    parser.add_argument(
        "--steps", type=positive, metavar="N", help=f"{SHORT.steps} otherwise, {FULL.steps} with --full"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here; DIR/demo.json otherwise")
    return parser
