"""`spec-rollout pretrain-draft`: a draft head for a policy ahead of its training, for those who want one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.bench.workload import DTYPES, load_policy, load_prompts, positive, warm_up
from spec_rollout.config import SpecConfig


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    policy = load_policy(args.policy, args.dtype, args.max_new_tokens)
    prompts = load_prompts(policy.tokenizer, args.prompts)
    try:
        params = replace(policy.params, temperature=args.temperature)
        config = SpecConfig(max_feature_tokens=args.max_feature_tokens, draft_ngrams=False)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    backend = EmbeddedBackend(policy.model, config, policy.tokenizer)
    size = args.batch_size
    batches = [[prompts[(turn * size + i) % len(prompts)] for i in range(size)] for turn in range(args.rollouts)]
    for _ in warm_up(backend, batches, params):
        backend.save(args.out)
    rates = ", ".join(f"{rate:.2f}" for rate in backend.learner.acceptance)
    print(f"{args.out}: acceptance by position {rates}. Use it with --draft_model_path {args.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spec-rollout pretrain-draft", description=__doc__)
    parser.add_argument("--policy", required=True, help="folder or hub id of a causal language model")
    parser.add_argument("--prompts", required=True, help="file or dataset with a column `prompt`, or `arithmetic`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the head")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rollouts", type=positive, default=20, metavar="N")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-feature-tokens", type=positive, default=SpecConfig().max_feature_tokens, metavar="N")
    return parser
