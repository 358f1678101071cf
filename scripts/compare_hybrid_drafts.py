"""For maintainers: GRPO on a hybrid policy with each kind of draft; the same completions, and what each draft brings.

python scripts/compare_hybrid_drafts.py --policy policies/hybrid --json benchmarks/cpu-hybrid-drafts.json
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from spec_rollout.bench.workload import hardware, positive, table, write_json
from spec_rollout.experiments import arithmetic_run
from spec_rollout.experiments.demo import Clock, Speculative
from spec_rollout.experiments.runs import Run
from spec_rollout.tasks.arithmetic import STYLES, worked_sums_reward

BATCH_SIZE, GENERATIONS, COMPLETION_TOKENS = 16, 4, 320
PLAIN = "none"
ARMS = {
    PLAIN: {"num_speculative_tokens": 0},
    "mtp": {"draft_head": "mtp", "draft_ngrams": False},
    "eagle3": {"draft_head": "eagle3", "draft_ngrams": False},
    "ngrams": {"draft_head": "eagle3", "draft_refresh": False},  # a head that never learns leaves them alone
}
ROLLOUTS = (1, 2, 5, 10, 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", required=True, metavar="DIR", help="from make_reference_policy.py")
    parser.add_argument("--style", choices=STYLES, default="full_sentences", help="as the policy learned")
    parser.add_argument("--steps", type=positive, default=20, metavar="N")
    parser.add_argument("--learning-rate", type=float, default=1e-4, metavar="RATE")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    runs = {name: train(name, options, args) for name, options in ARMS.items()}
    figures = {
        "identical": {name: identical(runs[PLAIN], run) for name, run in runs.items()},
        "tokens": sum(len(ids) for step in runs[PLAIN].completions for ids in step),
        "reward": runs[PLAIN].rewards,
        "drafts": {name: figures_of(run) for name, run in runs.items()},
        "hardware": hardware(),
        "setup": {"dtype": "float32", "date": time.strftime("%Y-%m-%d"), "batch_size": BATCH_SIZE}
        | {"steps": args.steps, "learning_rate": args.learning_rate, "style": args.style},
    }
    report(figures)
    write_json(args.json, figures)


def train(name: str, options: dict, args: argparse.Namespace) -> Run:
    """One GRPO run from the same weights, seed and prompts."""
    run = Run()
    with tempfile.TemporaryDirectory() as folder:
        trainer = arithmetic_run.make_trainer(
            Speculative,
            args.policy,
            Path(folder),
            Clock(run, name),
            steps=args.steps,
            learning_rate=args.learning_rate,
            seed=args.seed,
            reward=worked_sums_reward,
            batch_size=BATCH_SIZE,
            generations=GENERATIONS,
            max_completion_length=COMPLETION_TOKENS,
            style=STYLES[args.style],
            **options,
        )
        trainer.run = run
        trainer.train()
    run.weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    return run


def identical(plain: Run, run: Run) -> dict[str, bool]:
    """Whether `run` drew the tokens of `plain` and ended with its weights."""
    same = all(torch.equal(weight, run.weights[name]) for name, weight in plain.weights.items())
    return {"completions": plain.completions == run.completions, "weights": same}


def figures_of(run: Run) -> dict[str, list[float] | float]:
    """By rollout; tokens per second of decoding, the reading of prompts left out. Of the run: the seconds of its
    rollouts and of its steps, with all that the draft took in either."""
    return {
        "acceptance_length": [stats.mean_acceptance_length for stats in run.stats],
        "guessed": [statistics.mean(step.gamma for step in stats.steps) for stats in run.stats],
        "tokens_per_s": [
            sum(step.emitted for step in stats.steps) / sum(step.seconds for step in stats.steps)
            for stats in run.stats
        ],
        "rollout_seconds": sum(run.rollout_seconds),
        "step_seconds": sum(run.step_seconds),
    }


def report(figures: dict) -> None:
    """Print what is the same, and the drafts side by side."""
    for name, same in figures["identical"].items():
        print(f"{name}: {', '.join(f'{what} identical: {held}' for what, held in same.items())}")
    drafts, rollouts = figures["drafts"], [n for n in ROLLOUTS if n <= len(figures["reward"])]
    for what in ("acceptance_length", "guessed", "tokens_per_s"):
        print(f"\n{what} by rollout:")
        table(["draft", *map(str, rollouts)], [[n, *(d[what][i - 1] for i in rollouts)] for n, d in drafts.items()])


if __name__ == "__main__":
    main()
