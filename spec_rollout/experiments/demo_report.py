"""What the demo's three runs come to, and how it is told."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from spec_rollout.bench.workload import hardware, table
from spec_rollout.experiments.runs import Run
from spec_rollout.records import StepStats

TWO_LINES = """
    from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer   # was: from trl import GRPOConfig, GRPOTrainer
    trainer = SpecGRPOTrainer(..., args=SpecGRPOConfig(...))            # was: GRPOTrainer(..., args=GRPOConfig(...))
"""


def compare(baseline: Run, plain: Run, ours: Run) -> dict:
    """The demo's figures. Speed-ups compare total seconds: the draft's training and the measuring of what steps
    cost, in our first one, are charged."""
    lengths = [stats.mean_acceptance_length for stats in ours.stats]
    tenth = max(1, len(ours.rewards) // 10)

    def speedup(theirs: list[float], mine: list[float]) -> float:
        return sum(theirs) / sum(mine)

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


def report(figures: dict, out: Path) -> None:
    """Print the figures, where the picture is, and what to change in a script of one's own."""
    seconds = figures["rollout_seconds"]
    same = "identical" if figures["identical_completions"] else "NOT identical"
    weights = "identical" if figures["identical_weights"] else "NOT identical"
    print()
    table(
        ("sampler", "seconds of sampling", "ours, speculative: times as fast"),
        [
            ("TRL's own", seconds["transformers"], figures["rollout_speedup"]),
            ("ours, plain", seconds["plain"], figures["rollout_speedup_vs_plain"]),
            ("ours, speculative", seconds["speculative"], None),
        ],
    )
    print(
        f"All is counted: the draft's training, and measuring what a pass costs here. Whole steps, with the policy's "
        f"training: {figures['step_speedup']:.2f} x TRL's, {figures['step_speedup_vs_plain']:.2f} x our plain ones.\n"
        f"All {figures['tokens']} tokens of our two runs: {same}; final weights: {weights}.\n"
        f"Reward {figures['reward_first']:.2f} -> {figures['reward_last']:.2f} in {figures['steps']} steps; right on "
        f"{figures['heldout_accuracy_first']:.0%} -> {figures['heldout_accuracy_last']:.0%} of "
        f"{figures['heldout_problems']} problems held out.\n"
        f"A pass of the policy gave {figures['mean_acceptance_length_first']:.2f} tokens per row when guessing began, "
        f"{figures['mean_acceptance_length_last']:.2f} at the end."
    )
    print("\nHow far it guessed:")
    table(("completions under way", "tokens guessed for each (mean)"), list(figures["gamma_by_batch_size"].items()))
    print(f"\nPicture: {out / 'demo.png'}\n\nIn a GRPO script of your own, change two lines:\n{TWO_LINES}")
