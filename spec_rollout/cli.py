"""The `spec-rollout` command: finds the subcommand and hands it the rest of the line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

PROGRAM = "spec-rollout"


def grpo(argv: Sequence[str]) -> None:
    """train a policy with GRPO: --config FILE.yaml and any option of SpecGRPOConfig"""
    from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer
    from spec_rollout.training.launch import launch

    launch(SpecGRPOTrainer, SpecGRPOConfig, argv)


def rloo(argv: Sequence[str]) -> None:
    """train a policy with RLOO: --config FILE.yaml and any option of SpecRLOOConfig"""
    from spec_rollout.training import SpecRLOOConfig, SpecRLOOTrainer
    from spec_rollout.training.launch import launch

    launch(SpecRLOOTrainer, SpecRLOOConfig, argv)


def ppo(argv: Sequence[str]) -> None:
    """train a policy with PPO: --config FILE.yaml and any option of PPOConfig"""
    from spec_rollout.training import PPOConfig, PPOTrainer
    from spec_rollout.training.launch import launch

    launch(PPOTrainer, PPOConfig, argv)


def demo(argv: Sequence[str]) -> int | None:
    """train a small policy three ways and compare reward and time"""
    return import_module("spec_rollout.experiments.demo").main(argv)


def bench(argv: Sequence[str]) -> int | None:
    """measure tokens per second against transformers and plain decoding"""
    return import_module("spec_rollout.bench.bench").main(argv)


def check(argv: Sequence[str]) -> int | None:
    """compare token ids with and without speculation; exit 1 on any difference"""
    return import_module("spec_rollout.bench.check").main(argv)


def profile(argv: Sequence[str]) -> int | None:
    """measure what speculation does for a policy at every batch size: --policy DIR; writes one page"""
    return import_module("spec_rollout.profile.profile").main(argv)


def report(argv: Sequence[str]) -> int | None:
    """draw training runs, side by side: RUN_DIR [RUN_DIR ...]; writes one page"""
    return import_module("spec_rollout.profile.report").main(argv)


def simulate(argv: Sequence[str]) -> int | None:
    """predict recorded rollouts under other slots, ranks and costs: --trace FILE"""
    return import_module("spec_rollout.simulate.simulate").main(argv)


def pretrain_draft(argv: Sequence[str]) -> int | None:
    """train a draft head ahead of a run: --policy DIR --prompts FILE --out DIR"""
    return import_module("spec_rollout.experiments.pretrain").main(argv)


def serve(argv: Sequence[str]) -> int | None:
    """start a vLLM server that takes policy and draft while it runs: --policy DIR"""
    return import_module("spec_rollout.backends.vllm.serve").main(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    command.__name__.replace("_", "-"): command
    for command in (grpo, rloo, ppo, demo, bench, check, profile, report, simulate, pretrain_draft, serve)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: 2 for a command that is not known."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"{PROGRAM} {_version()}")
        return 0
    if name not in COMMANDS:
        print(f"{PROGRAM}: unknown command {name!r}: choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv[0] = f"{PROGRAM} {name}"  # what the subcommand's own usage message shows
    return COMMANDS[name](rest) or 0


def usage() -> str:
    """The commands with their first lines."""
    lines = [f"  {name:<16}{command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join([f"usage: {PROGRAM} COMMAND [options]   ({PROGRAM} COMMAND --help)", "", *lines])


def _version() -> str:
    try:
        return version("spec-rollout")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
