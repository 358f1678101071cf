"""`spec-rollout demo`: GRPO on one seed with three samplers; reward, time, and the tokens compared."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging
from trl import GRPOTrainer

from spec_rollout.bench.workload import (
    Policy,
    arithmetic_prompts,
    hardware,
    load_policy,
    positive,
    table,
    write_json,
)
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.experiments import arithmetic_run
from spec_rollout.experiments.pictures import draw_demo
from spec_rollout.experiments.runs import Run
from spec_rollout.records import RolloutStats, StepStats
from spec_rollout.tasks.reference_policy import make_reference_policy
from spec_rollout.training import SpecGRPOTrainer

HELDOUT_PROBLEMS = 256
LEARNING_RATE = 1e-4
SKIPPED_STEPS = 1
"""The first step warms up caches and, in our sampler, decodes without a draft; it counts in no speed-up but its draft
training is charged like any other."""


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
    policy = args.out / "policy"
    if not (policy / "config.json").exists():
        print(f"Making the reference policy in {policy}, once.", file=sys.stderr)
        make_reference_policy(policy, "small", seed=0)
    transformers_logging.set_verbosity_error()
    baseline = train("TRL's own sampler", Baseline, policy, args)
    plain = train("ours, plain decoding", Speculative, policy, args, num_speculative_tokens=0)
    ours = train("ours, speculative", Speculative, policy, args)
    figures = compare(baseline, plain, ours)
    judged = load_policy(str(policy), "float32", arithmetic_run.COMPLETION_TOKENS)
    figures["heldout_accuracy_first"] = heldout_accuracy(judged)
    with torch.no_grad():
        for name, weight in judged.model.named_parameters():
            weight.copy_(ours.weights[name])
    figures["heldout_accuracy_last"] = heldout_accuracy(judged)
    draw_demo(args.out / "demo.png", baseline, plain, ours)
    _report(args, figures, ours)
    return 0 if figures["identical_completions"] else 1


def train(name: str, trainer_class: type, policy: Path, args: argparse.Namespace, **options) -> Run:
    """One GRPO run from the same weights, seed and prompts."""
    run = Run()
    trainer = arithmetic_run.make_trainer(
        trainer_class,
        policy,
        args.out / "runs" / name.replace(" ", "-").replace(",", "").replace("'", ""),
        Clock(run, name),
        steps=args.steps,
        learning_rate=LEARNING_RATE,
        seed=args.seed,
        **options,
    )
    trainer.run = run
    trainer.train()
    run.weights = {n: p.detach().cpu().clone() for n, p in trainer.model.named_parameters()}
    return run


def heldout_accuracy(policy: Policy) -> float:
    """Share of HELDOUT_PROBLEMS unseen problems that `policy` gets right at T = 1.

    The prompts of a GRPO step are few and of uneven difficulty; this compares two policies on the same problems.
    """
    prompts = arithmetic_prompts(policy.tokenizer, HELDOUT_PROBLEMS)
    return arithmetic_run.accuracy(policy, RolloutEngine(policy.model).generate(prompts, policy.params))


def compare(baseline: Run, plain: Run, ours: Run) -> dict:
    """The demo's figures. Speed-ups compare total seconds after the first step, draft training charged to ours."""
    lengths = [stats.mean_acceptance_length for stats in ours.stats]
    tenth = max(1, len(ours.rewards) // 10)

    def speedup(theirs: list[float], mine: list[float]) -> float:
        return sum(theirs[SKIPPED_STEPS:]) / sum(mine[SKIPPED_STEPS:])

    return {
        "steps": len(ours.step_seconds),
        "reward_first": statistics.mean(ours.rewards[:tenth]),
        "reward_last": statistics.mean(ours.rewards[-tenth:]),
        "rollout_seconds": {
            "transformers": sum(baseline.rollout_seconds),
            "plain": sum(plain.rollout_seconds),
            "speculative": sum(ours.rollout_seconds),
        },
        "rollout_speedup": speedup(baseline.rollout_seconds, ours.rollout_seconds),
        "step_speedup": speedup(baseline.step_seconds, ours.step_seconds),
        "rollout_speedup_vs_plain": speedup(plain.rollout_seconds, ours.rollout_seconds),
        "step_speedup_vs_plain": speedup(plain.step_seconds, ours.step_seconds),
        "identical_completions": plain.completions == ours.completions,
        "identical_weights": all(torch.equal(plain.weights[name], ours.weights[name]) for name in plain.weights),
        "tokens": sum(len(ids) for step in ours.completions for ids in step),
        "mean_acceptance_length_first": next((length for length in lengths if length > 1), 1.0),
        "mean_acceptance_length_last": lengths[-1],
        "gamma_by_batch_size": gamma_by_batch_size([step for stats in ours.stats for step in stats.steps]),
        "hardware": hardware(),
    }


def gamma_by_batch_size(steps: list[StepStats]) -> dict[str, float]:
    """Mean number of guessed tokens by active rows, in powers of two; steps before the draft was ready left out."""
    first = next((i for i, step in enumerate(steps) if step.gamma), len(steps))
    groups: dict[int, list[int]] = {}
    for step in steps[first:]:
        groups.setdefault(step.rows.bit_length() - 1, []).append(step.gamma)
    return {
        (f"{2**k}" if k == 0 else f"{2**k}-{2 ** (k + 1) - 1}"): statistics.mean(groups[k]) for k in sorted(groups)
    }


def _report(args: argparse.Namespace, figures: dict, ours: Run) -> None:
    write_json(args.json or args.out / "demo.json", figures)
    seconds = figures["rollout_seconds"]
    table(
        ("sampler", "rollout seconds"),
        [("TRL's own", seconds["transformers"]), ("ours, plain", seconds["plain"]), ("ours", seconds["speculative"])],
    )
    print(
        f"reward {figures['reward_first']:.2f} -> {figures['reward_last']:.2f} in {figures['steps']} steps, right on "
        f"{figures['heldout_accuracy_first']:.0%} -> {figures['heldout_accuracy_last']:.0%} of "
        f"{HELDOUT_PROBLEMS} problems held out\n"
        f"rollouts {figures['rollout_speedup']:.2f} x as fast as TRL's own sampler "
        f"({figures['rollout_speedup_vs_plain']:.2f} x our plain decoding), whole steps "
        f"{figures['step_speedup']:.2f} x, draft training charged\n"
        f"mean acceptance length {figures['mean_acceptance_length_first']:.2f} -> "
        f"{figures['mean_acceptance_length_last']:.2f}"
    )
    table(("active rows", "tokens guessed (mean)"), list(figures["gamma_by_batch_size"].items()))
    same = "identical" if figures["identical_completions"] else "NOT identical"
    weights = "identical" if figures["identical_weights"] else "different"
    print(f"All {figures['tokens']} tokens of the two runs of ours: {same}; final weights: {weights}.")
    print(f"Picture: {args.out / 'demo.png'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spec-rollout demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR")
    parser.add_argument("--steps", type=positive, default=20, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here; DIR/demo.json otherwise")
    return parser
