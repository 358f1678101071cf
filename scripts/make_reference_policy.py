"""Train a small causal LM from nothing on worked arithmetic and save it as a Hugging Face folder.

python scripts/make_reference_policy.py --out policy --size small --seed 0
"""

import argparse
import time

from spec_rollout.tasks.reference_policy import ARCHITECTURES, RECIPES, make_reference_policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make; it must not hold anything yet")
    parser.add_argument(
        "--size",
        choices=RECIPES,
        default="small",
        help="demo: 1M parameters, easy problems; tiny: 1M; deep: 2M, twice as many layers; small: 6M, 7 minutes on 2 "
        "CPU cores; base: 63M, for a GPU",
    )
    parser.add_argument(
        "--architecture",
        choices=ARCHITECTURES,
        default="qwen3",
        help="qwen3_5: three of four layers are recurrent, and an MTP head is trained beside the policy; qwen3_moe: "
        "16 experts, 2 per token, which together are as wide as a dense layer",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args()
    began = time.perf_counter()
    out = make_reference_policy(args.out, args.size, args.seed, args.architecture)
    print(f"{args.size} {args.architecture} policy in {out}, trained in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
