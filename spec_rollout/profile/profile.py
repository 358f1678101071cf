"""`spec-rollout profile`: what speculation does for a policy and its prompts at every batch size, as one page."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from spec_rollout.backends.calibration import measured_cost
from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.backends.trace import HEAD, MODEL, NGRAMS, RolloutTrace, read_traces
from spec_rollout.backends.vllm.engine import require_vllm
from spec_rollout.bench.workload import (
    DRAFT_HELP,
    QUANTIZED,
    Policy,
    add_policy_arguments,
    draft_options,
    hardware,
    load_policy,
    load_prompts,
    positive,
    positives,
    table,
    write_json,
)
from spec_rollout.config import BACKENDS, SpecConfig
from spec_rollout.draft.draft_model import is_language_model
from spec_rollout.profile.charts import profile_charts
from spec_rollout.profile.limits import device_limits, memory
from spec_rollout.profile.measuring import (
    WIDEST,
    Measuring,
    OutOfTime,
    Sampler,
    Timed,
    batches,
    measured_engine,
    warm_backend,
)
from spec_rollout.profile.profile_figures import Found, profile_figures
from spec_rollout.profile.profile_page import warning, write_profile_page
from spec_rollout.simulate.cost_file import costs_to_json

VERSION = 1
"""Of profile.json; docs/profile.md describes it."""
TRACE_TOKENS = 32
INTERRUPTED = 130
"""Exit status after Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    found = Found(args.rollout_backend)
    try:
        _refuse(args)
        trace_file = _claim(args.out)
        policy = load_policy(args.policy, args.dtype, args.max_new_tokens)
        _measure(args, policy, load_prompts(policy.tokenizer, args.prompts), trace_file, found)
    except OutOfTime:
        pass  # a turn more or less
    except KeyboardInterrupt:
        found.interrupted = True
    except ValueError as error:
        raise SystemExit(f"spec-rollout profile: {error}") from error
    traces = read_traces([trace_file]).rollouts
    if not traces:
        remedy = f"give --seconds more than {args.seconds}, or --max-new-tokens fewer than {args.max_new_tokens}"
        cause = "interrupted before" if found.interrupted else f"the time was over before ({remedy})"
        print(f"spec-rollout profile: {cause} the first rollout had ended: nothing to report.", file=sys.stderr)
        return INTERRUPTED if found.interrupted else 1
    _report(args, found, traces)
    return INTERRUPTED if found.interrupted else 0


def _refuse(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: vLLM is asked for what it does not do, or is not installed.
    """
    if args.rollout_backend == "vllm":
        require_vllm()
        if args.trace:
            raise ValueError("--trace needs --rollout-backend embedded: vLLM's steps are not torch's alone.")


def _claim(out: Path) -> Path:
    """An empty trace file in the folder, so that it is known to be writable before anything is measured."""
    path = out / "trace.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    except OSError as error:
        raise SystemExit(f"--out {out} cannot be written: {error.strerror}; give another folder.") from error
    return path


def _measure(
    args: argparse.Namespace, policy: Policy, prompts: list[list[int]], trace_file: Path, found: Found
) -> None:
    deadline = time.perf_counter() + args.seconds
    slots = max(args.batch_sizes)
    draft = None if args.draft_model is None else str(args.draft_model)
    config = SpecConfig(
        num_speculative_tokens=3,
        max_slots=slots,
        draft_refresh=draft in (None, QUANTIZED) or is_language_model(draft),
        **draft_options(draft),
    )
    backend, found.draft_rollouts = warm_backend(policy, prompts, config, deadline)
    found.memory = lambda: memory(found.engine, backend.drafter, backend.learner)
    found.history = backend.history
    found.limits = device_limits(policy.model, backend.drafter)
    recorder = Timed(slots, trace_file, deadline)
    if args.rollout_backend == "vllm":
        measuring = _on_vllm(policy, backend, slots, batches(prompts, slots, 0)[0], recorder)
    else:
        measuring = _on_embedded(policy, backend, slots, recorder, found)
    found.costs = measuring.costs
    for source, cost in found.costs.items():
        recorder.cost(cost, source)
    if args.trace:
        _torch_trace(args.out / "torch_trace.json", measuring, batches(prompts, slots, 0)[0])
    measuring.run(prompts, args.batch_sizes, args.fixed_gammas, args.turns)


def _on_embedded(policy: Policy, backend: EmbeddedBackend, slots: int, recorder: Timed, found: Found) -> Measuring:
    drafters = {HEAD: backend.drafter, NGRAMS: backend.ngrams.drafter}
    if backend.model.drafter is not None:
        backend.model.collect_with(None)
        drafters[MODEL] = backend.model.drafter
    found.engine, costs = measured_engine(policy, backend, slots), {}
    for source, drafter in drafters.items():
        found.engine.drafter = drafter
        costs[source] = measured_cost(found.engine, slots, WIDEST, None)
    return Measuring(policy, found.engine, drafters, costs, recorder)


def _on_vllm(
    policy: Policy, backend: EmbeddedBackend, slots: int, batch: list[list[int]], recorder: Timed
) -> Measuring:
    from spec_rollout.profile.vllm_measuring import VLLMMeasuring

    began = time.perf_counter()
    with TemporaryDirectory(prefix="spec-rollout-") as folder:
        backend.save(folder)
        measuring = VLLMMeasuring(policy, Path(folder), slots, batch, recorder)
    recorder.deadline += time.perf_counter() - began  # starting and compiling two vLLMs takes minutes
    return measuring


def _torch_trace(path: Path, measuring: Measuring, batch: list[list[int]]) -> None:
    """The first tokens of a rollout with guesses under torch's profiler, for chrome://tracing or Perfetto."""
    measuring.use(Sampler("fixed", 3))
    with torch.profiler.profile() as profile:
        measuring.engine.generate(batch, measuring.policy.params, max_new_tokens=[TRACE_TOKENS] * len(batch))
    profile.export_chrome_trace(str(path))


def _report(args: argparse.Namespace, found: Found, traces: list[RolloutTrace]) -> None:
    figures, costs = profile_figures(found, traces)
    wanted = len(args.batch_sizes) * (len(args.fixed_gammas) + 1 + len(found.costs))
    figures = {"version": VERSION, "complete": len(figures["throughput"]) == wanted} | _setup(args, found) | figures
    write_json(args.out / "profile.json", figures)
    write_json(args.out / "cost.json", costs_to_json(costs, found.costs))
    write_json(args.json, figures)
    charts = profile_charts(figures, args.out)
    write_profile_page(args.out / "report.html", figures, charts)
    keys = ("batch_size", "sampler", "gamma", "tokens_per_s", "speedup_vs_plain", "mean_acceptance_length")
    header = ("rows", "sampler", "guessed", "tokens/s", "× plain", "acceptance length")
    table(header, [[row[key] for key in keys] for row in figures["throughput"]])
    for item in figures["advice"]:
        print(f"- {item['text']}")
    print(warning(figures) or "Every sampler ran at every batch size.")
    print(f"Page: {args.out / 'report.html'}")


def _setup(args: argparse.Namespace, found: Found) -> dict:
    try:
        installed = version("spec-rollout")
    except PackageNotFoundError:
        installed = None
    setup = {
        "policy": args.policy,
        "prompts": args.prompts,
        "draft_model": None if args.draft_model is None else str(args.draft_model),
        "draft_rollouts": found.draft_rollouts,
        "rollout_backend": args.rollout_backend,
        "dtype": args.dtype,
        "max_new_tokens": args.max_new_tokens,
        "date": time.strftime("%Y-%m-%d"),
        "spec_rollout": installed,
    }
    return {"interrupted": found.interrupted, "setup": setup, "hardware": hardware()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spec-rollout profile", description=__doc__)
    add_policy_arguments(parser)
    parser.add_argument(
        "--prompts", default="arithmetic", help="file or dataset with a column `prompt`; the demo's problems otherwise"
    )
    parser.add_argument("--draft-model", type=Path, metavar="DIR", help=DRAFT_HELP)
    parser.add_argument("--rollout-backend", choices=BACKENDS, default="embedded", help="who samples")
    parser.add_argument("--batch-sizes", type=positives, default=[1, 4, 16, 48], metavar="1,8,32")
    parser.add_argument("--fixed-gammas", type=positives, default=[1, 3, 5], metavar="1,3,5")
    parser.add_argument("--turns", type=positive, default=5, metavar="N", help="how often each sampler runs")
    parser.add_argument("--seconds", type=positive, default=200, metavar="N", help="end the rollouts after so long")
    parser.add_argument("--out", type=Path, default=Path("profile"), metavar="DIR")
    parser.add_argument("--trace", action="store_true", help="also a torch.profiler trace of a few steps")
    return parser
