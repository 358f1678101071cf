"""`spec-rollout check`: the same tokens with and without speculation, or exit status 1."""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from spec_rollout.bench import architectures
from spec_rollout.bench.comparison import identical_share, shown
from spec_rollout.bench.workload import (
    WARM_UP_PROMPTS,
    Policy,
    add_policy_arguments,
    arithmetic_prompts,
    load_policy,
    positive,
    positives,
    table,
    warm_backend,
    write_json,
)
from spec_rollout.config import SpecConfig
from spec_rollout.draft.ngram_drafter import NgramDrafter
from spec_rollout.draft.ngrams import History
from spec_rollout.draft.references import OracleDrafter, RandomDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.protocols import Drafter
from spec_rollout.gamma import FixedGamma
from spec_rollout.records import Completion, StepStats

WIDEST = 7
SEED = (20,)


@dataclass
class Case:
    """One way to decode, compared with plain decoding in one large batch."""

    gamma: int | str
    batch_size: int
    identical: bool
    identical_share: float
    tokens: int
    mean_acceptance_length: float
    max_logprob_error: float
    near_ties: int


class RandomGamma:
    """Another γ in every step."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def choose(self, batch_size: int, context: int) -> int:
        return int(torch.randint(WIDEST + 1, (), generator=self.generator))

    def observe(self, stats: StepStats) -> None:
        pass


def main(argv: list[str] | None = None) -> int:
    if "--architectures" in (sys.argv[1:] if argv is None else argv):
        return architectures.main(argv)
    args = _parser().parse_args(argv)
    policy = load_policy(args.policy, args.dtype, args.max_new_tokens)
    prompts = arithmetic_prompts(policy.tokenizer, args.num_prompts)
    plain = RolloutEngine(policy.model, SpecConfig(max_slots=max(args.batch_sizes)))
    expected = plain.generate(prompts, policy.params, seed=SEED)
    drafter = _drafter(args.drafter, policy, expected)
    truth = [teacher_forced(policy, prompt, c) for prompt, c in zip(prompts, expected, strict=True)]
    cases = []
    grid = list(itertools.product(args.gammas, args.batch_sizes))
    for gamma, batch_size in tqdm(grid, desc="check", unit="case", file=sys.stderr):
        controller = RandomGamma() if gamma == "random" else FixedGamma(int(gamma))
        config = SpecConfig(max_slots=batch_size, max_num_speculative_tokens=WIDEST)
        engine = RolloutEngine(policy.model, config, drafter=drafter, controller=controller)
        found = engine.generate(prompts, policy.params, seed=SEED)
        identical = [c.token_ids for c in found] == [c.token_ids for c in expected]
        error = max(map(_largest_difference, found, truth)) if identical else float("inf")
        tokens = sum(len(c.token_ids) for c in found)
        length = engine.stats.mean_acceptance_length
        share = identical_share(found, expected)
        cases.append(Case(gamma, batch_size, identical, share, tokens, length, error, engine.stats.near_ties))
    return _report(args, cases, plain.target.precision)


def teacher_forced(policy: Policy, prompt: list[int], completion: Completion) -> torch.Tensor:
    """Log-probs [n] of the completion's tokens from one plain pass of the model over the whole sequence."""
    ids = torch.tensor([[*prompt, *completion.token_ids]], device=policy.model.device)
    with torch.no_grad():
        logits = policy.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()


def _largest_difference(completion: Completion, truth: torch.Tensor) -> float:
    return (torch.tensor(completion.logprobs) - truth).abs().max().item()


def _drafter(kind: str, policy: Policy, expected: list[Completion]) -> Drafter:
    if kind == "random":
        return RandomDrafter()
    if kind == "oracle":
        return OracleDrafter(expected)
    if kind == "ngrams":
        history, earlier = (
            History(policy.model.device),
            arithmetic_prompts(policy.tokenizer, WARM_UP_PROMPTS, seed=1000),
        )
        drawn = RolloutEngine(policy.model).generate(earlier, policy.params)
        history.add((prompt, completion.token_ids) for prompt, completion in zip(earlier, drawn, strict=True))
        return NgramDrafter(history)
    drafter = warm_backend(policy, SpecConfig(num_speculative_tokens=3)).drafter
    drafter.collector.buffer = None
    return drafter


def _report(args: argparse.Namespace, cases: list[Case], precision: torch.dtype) -> int:
    speculative = [case for case in cases if case.gamma != 0]
    figures = {
        "identical": all(case.identical for case in cases),
        "identical_share": min(case.identical_share for case in cases),
        "precision": str(precision).removeprefix("torch."),
        "tokens": min(case.tokens for case in cases),
        "mean_acceptance_length": (
            sum(case.mean_acceptance_length for case in speculative) / len(speculative) if speculative else 1.0
        ),
        "max_logprob_error": max(case.max_logprob_error for case in cases),
        "cases": [asdict(case) for case in cases],
    }
    header = (
        "tokens guessed",
        "batch size",
        "identical",
        "tokens",
        "acceptance length",
        "log-prob error",
        "near-ties",
    )
    rows = [list(asdict(case).values()) for case in cases]
    table(header, [[*row[:2], shown(row[3]), *row[4:6], f"{row[6]:.1e}", row[7]] for row in rows])
    verdict = (
        "identical to plain decoding in every case" if figures["identical"] else "NOT identical to plain decoding"
    )
    least = shown(min(case.identical_share for case in cases))
    print(
        f"{figures['tokens']} tokens per case, computed in {figures['precision']}: {verdict}. At least {least} of a "
        "case's tokens are the same before a first difference."
    )
    write_json(args.json, figures)
    return 0 if figures["identical"] else 1


def _gammas(text: str) -> list[int | str]:
    gammas: list[int | str] = [item if item == "random" else int(item) for item in text.split(",")]
    if any(isinstance(gamma, int) and not 0 <= gamma <= WIDEST for gamma in gammas):
        raise argparse.ArgumentTypeError(f"{text}: each must be 0 to {WIDEST}, or 'random'")
    return gammas


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spec-rollout check", description=__doc__)
    add_policy_arguments(parser)
    parser.add_argument("--gammas", type=_gammas, default=_gammas("0,1,3,7,random"), metavar="0,1,random")
    parser.add_argument("--batch-sizes", type=positives, default=[1, 8, 48], metavar="1,8,48")
    parser.add_argument("--num-prompts", type=positive, default=256, metavar="N")
    parser.add_argument(
        "--architectures",
        action="store_true",
        help="instead of a policy, tiny models of all architectures that transformers knows (--architectures --help)",
    )
    parser.add_argument("--drafter", choices=("head", "ngrams", "random", "oracle"), default="head")
    return parser
