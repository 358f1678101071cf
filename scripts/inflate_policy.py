"""Grow a trained small policy to the cost of a larger model without changing what it says.

python scripts/inflate_policy.py --policy policies/small --to 0.4b --out policies/0.4b
"""

import argparse
import sys
from pathlib import Path

from spec_rollout.bench.workload import DTYPES, arithmetic_prompts, load_policy, positive
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.tasks.inflation import BOUND, SHAPES, divergence, inflate

TEXTS = 16


def main() -> int:
    args = _parser().parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        raise SystemExit(f"{args.out} exists and is not an empty folder: remove it or choose another one.")
    policy = load_policy(args.policy, "float32", 256)
    small = policy.model.cpu()
    prompts = arithmetic_prompts(policy.tokenizer, TEXTS)
    drawn = RolloutEngine(small).generate(prompts, policy.params)
    texts = [[*prompt, *completion.token_ids] for prompt, completion in zip(prompts, drawn, strict=True)]
    model = inflate(small, SHAPES[args.to], args.vocab_size, args.seed)
    mean, largest = divergence(small, model, texts)
    print(f"float32: the distribution changed by {mean:.1e} nats per token (at most {largest:.1e})")
    if mean > BOUND:
        raise SystemExit(f"That is more than {BOUND}: nothing was written.")
    if args.dtype != "float32":
        model = model.to(DTYPES[args.dtype])
        mean, largest = divergence(small, model, texts)
        print(f"{args.dtype}: {mean:.1e} nats per token (at most {largest:.1e}), rounding included")
    model.save_pretrained(args.out)
    policy.tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {model.num_parameters() / 1e6:.0f}M parameters")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", required=True, help="folder of a policy from scripts/make_reference_policy.py")
    parser.add_argument("--to", choices=SHAPES, required=True, help="the cost of a model of this size")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--vocab-size", type=positive, metavar="N", help="tokens; by default as many as the policy has"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights on disk")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    return parser


if __name__ == "__main__":
    sys.exit(main())
