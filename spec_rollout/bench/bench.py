"""`spec-rollout bench`: samplers side by side in one run, interleaved and repeated; medians."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spec_rollout.backends.calibration import measured_cost
from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.bench import contexts
from spec_rollout.bench.memory import peak_memory_gib, reset_peak_memory
from spec_rollout.bench.own_samplers import own_samplers
from spec_rollout.bench.peers import PEERS, Measured, Sampler, peers_of
from spec_rollout.bench.rows import rows_of
from spec_rollout.bench.vllm_peers import VLLM, VLLM_EAGLE, VLLMPeers, require_vllm_in
from spec_rollout.bench.workload import (
    DRAFT_HELP,
    Policy,
    add_policy_arguments,
    arithmetic_prompts,
    draft_options,
    hardware,
    load_policy,
    positive,
    positives,
    table,
    warm_backend,
    write_json,
)
from spec_rollout.config import VERIFICATIONS, SpecConfig
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.gamma import FixedGamma
from spec_rollout.records import RolloutStats
from spec_rollout.tasks.arithmetic import STYLES


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    in_vllm = [name for name in args.peers if name in (VLLM, VLLM_EAGLE)]
    if in_vllm:
        require_vllm_in(args.vllm_python)
    policy = load_policy(args.policy, args.dtype, args.max_new_tokens)
    if args.contexts:
        contexts.require_context(policy, args.contexts, args.max_new_tokens)
    widest = max(args.batch_sizes)
    drafter = _drafter(policy, args, widest)
    config = SpecConfig(max_slots=4096, compile_passes=args.compile_passes)
    measuring = RolloutEngine(policy.model, config, drafter=drafter, controller=FixedGamma(0))
    cost = measured_cost(measuring, widest, config.widest, None)
    if args.contexts:
        # Every row to its last token: an end would come sooner after one context than after another.
        policy = policy._replace(params=replace(policy.params, eos_token_ids=()))
    rows = []
    setup = args.policy, args.dtype, widest, drafter, args.fixed_gammas, args.vllm_python
    with closing(VLLMPeers(in_vllm, policy, *setup)) as vllm:
        for batch_size in args.batch_sizes:
            peers = [*peers_of(policy, batch_size, [n for n in args.peers if n in PEERS]), *vllm.samplers()]
            samplers = [*peers, *own_samplers(policy, measuring, cost, args)]
            if args.contexts:
                rows += contexts.rows_over_contexts(policy, samplers, batch_size, args)
            else:
                rows += rows_of(batch_size, measure(policy, samplers, batch_size, args))
    _report(args, rows, measuring.target.path)
    return 0


def _drafter(policy: Policy, args: argparse.Namespace, slots: int) -> Any:
    """With the draft in `args.draft`, or else a head that has just learned from a few rollouts; it learns no more."""
    given = draft_options(args.draft) | {"compile_passes": args.compile_passes}
    config = SpecConfig(num_speculative_tokens=3, max_slots=slots, **given)
    if args.draft is None:
        backend = warm_backend(policy, config, STYLES[args.style])
    else:
        backend = EmbeddedBackend(policy.model, config, policy.tokenizer)
    backend.drafter.collector.buffer = None
    if backend.model.drafter is None:
        return backend.drafter
    if VLLM_EAGLE in args.peers:
        raise SystemExit(f"--peers {VLLM_EAGLE} needs a head, which --draft {args.draft} is not: leave one out.")
    backend.model.collect_with(None)
    return backend.model.drafter


def measure(
    policy: Policy, samplers: list[Sampler], batch_size: int, args: argparse.Namespace
) -> list[tuple[Sampler, list[Measured]]]:
    """Every sampler on the same prompts, turn by turn, so that a slow moment of the machine meets all of them."""
    batches = max(1, -(-args.num_prompts // batch_size))
    found: dict[Sampler, list[Measured]] = defaultdict(list)
    turns = tqdm(range(-1, args.repeats), desc=f"bench, batch size {batch_size}", unit="turn", file=sys.stderr)
    for turn in turns:  # turn -1 warms up
        prompts = arithmetic_prompts(policy.tokenizer, batches * batch_size, turn + 1, STYLES[args.style])
        for sampler in samplers if turn % 2 else reversed(samplers):
            reset_peak_memory()
            runs = [sampler.run(prompts[i : i + batch_size], turn + 1) for i in range(0, len(prompts), batch_size)]
            if turn >= 0:
                found[sampler].append(_sum(runs, peak_memory_gib()))
    return [(sampler, found[sampler]) for sampler in samplers]


def _sum(runs: list[Measured], peak: float | None) -> Measured:
    stats = None
    if runs[0].stats is not None:
        stats = RolloutStats(
            [step for run in runs for step in run.stats.steps],
            sum(run.stats.seconds for run in runs),
            sum(run.stats.prefill_s for run in runs),
        )
    elsewhere = [run.peak_memory_gib for run in runs if run.peak_memory_gib is not None]
    memory = max(elsewhere, default=peak)
    return Measured(sum(run.tokens for run in runs), sum(run.seconds for run in runs), stats, memory)


COLUMNS = {
    "engine": "engine",
    "verification": "verification",
    "batch_size": "batch size",
    "gamma": "tokens guessed",
    "tokens_per_s": "tokens/s",
    "mean_acceptance_length": "acceptance length",
    "mean_gamma": "mean guessed",
    "host_time_share": "host share",
    "speedup_vs_transformers": "× transformers",
    "speedup_vs_plain": "× plain",
    "regret_vs_best_fixed": "regret",
    "cold_regret": "cold regret",
}


def _report(args: argparse.Namespace, rows: list[dict], path: str) -> None:
    if args.contexts:
        contexts.show(rows, args.json)
    else:
        table(list(COLUMNS.values()), [[row[key] for key in COLUMNS] for row in rows])
    setup = {
        "policy": args.policy,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "max_new_tokens": args.max_new_tokens,
        "compile_passes": args.compile_passes,
        "style": args.style,
        "draft": args.draft and Path(args.draft).name,
        "path": path,
    }
    print(f"Our passes: {path}.")
    write_json(args.json, {"rows": rows, "hardware": hardware(), "setup": setup})


def _some_of(kind: str, known: Iterable[str]) -> Callable[[str], list[str]]:
    """The parser of a comma-separated list of names out of `known`; it may be empty."""

    def parse(text: str) -> list[str]:
        names = text.split(",") if text else []
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {kind} {', '.join(unknown)}; there is {', '.join(known)}")
        return names

    return parse


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.contexts and not set(args.peers) <= {"transformers"}:
        parser.error("--contexts compares with transformers alone: leave --peers out, or give it empty.")
    sizes, gammas = ([1], [3]) if args.contexts else ([1, 4, 8, 16, 32], [1, 2, 3, 5])
    args.batch_sizes, args.fixed_gammas = args.batch_sizes or sizes, args.fixed_gammas or gammas
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spec-rollout bench", description=__doc__)
    add_policy_arguments(parser)
    parser.add_argument("--batch-sizes", type=positives, metavar="1,8,32")
    parser.add_argument("--fixed-gammas", type=positives, metavar="1,2,3")
    parser.add_argument(
        "--contexts",
        type=positives,
        metavar="64,1024,8192",
        help="instead of tokens per second: what a token costs after prompts of so many tokens, by default of one row "
        "and with 3 guesses; --json FILE also draws it, as FILE.png",
    )
    peers = [*PEERS, VLLM, VLLM_EAGLE]
    parser.add_argument("--peers", type=_some_of("peer", peers), default=["transformers"], metavar=",".join(peers))
    parser.add_argument("--vllm-python", default=sys.executable, metavar="PATH", help="interpreter that has vLLM")
    parser.add_argument(
        "--verification",
        type=_some_of("verification", VERIFICATIONS),
        default=["coupled"],
        metavar=",".join(VERIFICATIONS),
    )
    parser.add_argument("--draft", metavar="DIR", help=DRAFT_HELP)
    parser.add_argument("--compile-passes", action="store_true", help="our engine as with compile_passes=True")
    parser.add_argument(
        "--style", choices=STYLES, default="varied", help="of the problems, as the policy learned them"
    )
    parser.add_argument("--num-prompts", type=positive, default=8, metavar="N", help="least prompts per turn")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N")
    return parser
