"""`spec-rollout bench`: samplers side by side in one run, interleaved and repeated; medians."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from spec_rollout.backends.calibration import measured_cost
from spec_rollout.config import SpecConfig
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.gamma import FixedGamma, GammaController
from spec_rollout.profile.workload import (
    Policy,
    add_policy_arguments,
    arithmetic_prompts,
    hardware,
    load_policy,
    positive,
    positives,
    table,
    warm_backend,
    write_json,
)
from spec_rollout.records import Drafter, RolloutStats

PEERS = ("transformers",)


@dataclass(frozen=True)
class Measured:
    """One run of one sampler: tokens drawn, wall seconds, and our own engine's statistics."""

    tokens: int
    seconds: float
    stats: RolloutStats | None = None


@dataclass(frozen=True)
class Sampler:
    """A contender: `run(prompts, seed)` samples one completion per prompt, all of them as one batch."""

    engine: str
    gamma: int | None
    run: Callable[[list[list[int]], int], Measured]


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    policy = load_policy(args.policy, args.dtype, args.max_new_tokens)
    widest = max(args.batch_sizes)
    backend = warm_backend(policy, SpecConfig(num_speculative_tokens=3, max_slots=widest))
    drafter = backend.drafter
    drafter.buffer = None
    measuring = RolloutEngine(policy.model, SpecConfig(max_slots=widest), drafter=drafter)
    cost = measured_cost(measuring, widest, SpecConfig().widest, None)
    rows = []
    for batch_size in args.batch_sizes:
        controller = GammaController(cost, SpecConfig().widest)
        samplers = [_peer(name, policy) for name in args.peers]
        samplers += [_ours(policy, "plain", 0, None, None)]
        samplers += [_ours(policy, "fixed", gamma, drafter, FixedGamma(gamma)) for gamma in args.fixed_gammas]
        samplers += [_ours(policy, "adaptive", None, drafter, controller)]
        rows += _rows(batch_size, measure(policy, samplers, batch_size, args))
    _report(args, rows)
    return 0


def measure(
    policy: Policy, samplers: list[Sampler], batch_size: int, args: argparse.Namespace
) -> list[tuple[Sampler, list[Measured]]]:
    """Every sampler on the same prompts, turn by turn, so that a slow moment of the machine meets all of them."""
    batches = max(1, -(-args.num_prompts // batch_size))
    found: dict[Sampler, list[Measured]] = defaultdict(list)
    turns = tqdm(range(-1, args.repeats), desc=f"bench, batch size {batch_size}", unit="turn", file=sys.stderr)
    for turn in turns:  # turn -1 warms up
        prompts = arithmetic_prompts(policy.tokenizer, batches * batch_size, seed=turn + 1)
        for sampler in samplers if turn % 2 else reversed(samplers):
            runs = [sampler.run(prompts[i : i + batch_size], turn + 1) for i in range(0, len(prompts), batch_size)]
            if turn >= 0:
                found[sampler].append(_sum(runs))
    return [(sampler, found[sampler]) for sampler in samplers]


def _sum(runs: list[Measured]) -> Measured:
    steps = [step for run in runs if run.stats for step in run.stats.steps]
    stats = RolloutStats(steps) if runs[0].stats else None
    return Measured(sum(run.tokens for run in runs), sum(run.seconds for run in runs), stats)


def _ours(policy: Policy, name: str, gamma: int | None, drafter: Drafter | None, controller) -> Sampler:
    engine = RolloutEngine(policy.model, SpecConfig(max_slots=4096), drafter=drafter, controller=controller)

    def run(prompts: list[list[int]], seed: int) -> Measured:
        engine.stats = RolloutStats()
        began = time.perf_counter()
        completions = engine.generate(prompts, policy.params, seed=(seed,))
        return Measured(sum(len(c.token_ids) for c in completions), time.perf_counter() - began, engine.stats)

    return Sampler(name, gamma, run)


def _peer(name: str, policy: Policy) -> Sampler:
    """`transformers.generate` on left-padded prompts, as TRL calls it."""
    eos = list(policy.params.eos_token_ids)
    pad = policy.tokenizer.pad_token_id if policy.tokenizer.pad_token_id is not None else eos[0]
    config = GenerationConfig(
        max_new_tokens=policy.params.max_new_tokens,
        do_sample=True,
        eos_token_id=eos,
        pad_token_id=pad,
        disable_compile=True,
    )

    def run(prompts: list[list[int]], seed: int) -> Measured:
        torch.manual_seed(seed)
        began = time.perf_counter()
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=policy.model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=policy.model.device)
        with torch.no_grad():
            output = policy.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        new = output[:, width:]
        ended = torch.isin(new, torch.tensor(eos, device=new.device)).long()
        tokens = int((ended.cumsum(1) - ended == 0).sum())  # up to and including the first EOS
        return Measured(tokens, time.perf_counter() - began)

    return Sampler(name, None, run)


def _rows(batch_size: int, results: list[tuple[Sampler, list[Measured]]]) -> list[dict]:
    """One row per sampler; speed-ups are medians of the ratios within a turn."""
    speeds = {sampler: [m.tokens / m.seconds for m in runs] for sampler, runs in results}
    base = {sampler.engine: speeds[sampler] for sampler, _ in results if sampler.engine in ("transformers", "plain")}
    rows = []
    for sampler, runs in results:
        stats = RolloutStats([step for m in runs if m.stats for step in m.stats.steps])
        row = {
            "engine": sampler.engine,
            "batch_size": batch_size,
            "gamma": sampler.gamma,
            "tokens_per_s": statistics.median(speeds[sampler]),
            "tokens_per_s_min": min(speeds[sampler]),
            "tokens_per_s_max": max(speeds[sampler]),
            "mean_acceptance_length": stats.mean_acceptance_length if stats.steps else None,
            "mean_gamma": sum(s.gamma for s in stats.steps) / len(stats.steps) if stats.steps else None,
        }
        for name in ("transformers", "plain"):
            ratios = [mine / theirs for mine, theirs in zip(speeds[sampler], base.get(name, []), strict=False)]
            row[f"speedup_vs_{name}"] = statistics.median(ratios) if ratios else None
        rows.append(row)
    return rows


def _report(args: argparse.Namespace, rows: list[dict]) -> None:
    columns = {
        "engine": "engine",
        "batch_size": "batch size",
        "gamma": "tokens guessed",
        "tokens_per_s": "tokens/s",
        "mean_acceptance_length": "acceptance length",
        "mean_gamma": "mean guessed",
        "speedup_vs_transformers": "× transformers",
        "speedup_vs_plain": "× plain",
    }
    table(list(columns.values()), [[row[key] for key in columns] for row in rows])
    setup = {
        "policy": args.policy,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "max_new_tokens": args.max_new_tokens,
    }
    write_json(args.json, {"rows": rows, "hardware": hardware(), "setup": setup})


def _choices(text: str) -> list[str]:
    names = text.split(",") if text else []
    unknown = sorted(set(names) - set(PEERS))
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown peer {', '.join(unknown)}; there is {', '.join(PEERS)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spec-rollout bench", description=__doc__)
    add_policy_arguments(parser)
    parser.add_argument("--batch-sizes", type=positives, default=[1, 4, 8, 16, 32], metavar="1,8,32")
    parser.add_argument("--fixed-gammas", type=positives, default=[1, 2, 3, 5], metavar="1,2,3")
    parser.add_argument("--peers", type=_choices, default=list(PEERS), metavar=",".join(PEERS))
    parser.add_argument("--num-prompts", type=positive, default=8, metavar="N", help="least prompts per turn")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N")
    return parser
