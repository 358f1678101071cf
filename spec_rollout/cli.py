"""The `spec-rollout` command: finds the subcommand and hands it the rest of the line."""

from __future__ import annotations

import sys
import traceback
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


def doctor(argv: Sequence[str]) -> int | None:
    """look at versions, device and compilers: what is missing, whether it matters, what mends it"""
    return import_module("spec_rollout.doctor").main(argv)


def serve(argv: Sequence[str]) -> int | None:
    """start a vLLM server that takes policy and draft while it runs: --policy DIR"""
    return import_module("spec_rollout.backends.vllm.serve").main(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    command.__name__.replace("_", "-"): command
    for command in (grpo, rloo, ppo, demo, bench, check, profile, report, simulate, pretrain_draft, serve, doctor)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: 2 for what the user can mend, told in one line."""
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
    try:
        return COMMANDS[name](rest) or 0
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            tell(name, stopped.code)
            stopped.code = 2
        raise
    except (OSError, ValueError, ModuleNotFoundError, *_of_files()) as error:
        message = mistake(error)
        if message is None:
            raise
    tell(name, message)
    return 2


def tell(name: str, message: str) -> None:
    """Say in one line what the user can mend."""
    print(f"{PROGRAM} {name}: {' '.join(message.removeprefix(f'{PROGRAM} {name}: ').split())}", file=sys.stderr)


def mistake(error: Exception) -> str | None:
    """What to tell of an error that is the user's to mend: a refusal of our own, a file, a package that is not there.
    None for a fault in a program, which keeps its traceback."""
    if isinstance(error, ModuleNotFoundError):
        ours = (error.name or "").partition(".")[0] == __package__
        return None if ours else f"{error.name} is not installed: `{PROGRAM} doctor` tells what is missing."
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error).partition("\n")[0]
    if isinstance(error, ValueError):
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        raised_here = bool(frames) and frames[-1].f_globals.get("__name__", "").partition(".")[0] == __package__
        reads = any(frame.f_code.co_name == "from_pretrained" for frame in frames)
        return str(error) if raised_here or reads else None
    return f"a file cannot be read: {error}"


def _of_files() -> tuple[type[Exception], ...]:
    """What the libraries that read recipes and weights raise, where they were imported."""
    yaml, safetensors = sys.modules.get("yaml"), sys.modules.get("safetensors")
    return (*([yaml.YAMLError] if yaml else []), *([safetensors.SafetensorError] if safetensors else []))


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
