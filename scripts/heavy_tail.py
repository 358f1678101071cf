"""For maintainers: memory and speed of completions of very unlike lengths.

python scripts/heavy_tail.py --policy policies/small [--max-cache-gib 0.02] [--draft DIR --gamma 0]
"""

import argparse
import json
import time

import numpy as np

from spec_rollout.bench.workload import arithmetic_prompts, load_policy
from spec_rollout.config import SpecConfig
from spec_rollout.draft.checkpoint_reader import load_head
from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.eagle import HeadConfig
from spec_rollout.draft.features import FeatureBuffer
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.gamma import FixedGamma
from spec_rollout.records import SamplingParams

ROWS, SHORTEST, LONGEST = 64, 20, 2000


def main() -> None:
    args = _parser().parse_args()
    policy = load_policy(args.policy, "float32", LONGEST)
    policy.model.config.max_position_embeddings = 2 * args.limit
    prompts = arithmetic_prompts(policy.tokenizer, ROWS)
    drawn = SHORTEST * (1 - np.random.default_rng(0).random(ROWS)) ** (-1 / args.tail)
    lengths = np.clip(drawn.astype(int), SHORTEST, LONGEST)
    options = {} if args.max_cache_gib is None else {"max_cache_gib": args.max_cache_gib}
    config = SpecConfig(max_slots=ROWS, num_speculative_tokens=args.gamma, **options)
    drafter = drafter_of(args.draft, policy.model, config) if args.draft else None
    engine = RolloutEngine(policy.model, config, drafter=drafter, controller=drafter and FixedGamma(args.gamma))
    began = time.perf_counter()
    completions = engine.generate(prompts, SamplingParams(max_new_tokens=args.limit), max_new_tokens=lengths.tolist())
    seconds = time.perf_counter() - began
    heads = policy.model.config.num_key_value_heads * policy.model.config.head_dim
    token = 2 * 4 * heads * policy.model.config.num_hidden_layers
    longest = max(map(len, prompts))
    live = max(int((lengths >= n).sum()) * (n + longest) for n in range(1, LONGEST + 1))
    figures = {
        "seconds": seconds,
        "tokens_per_second": int(lengths.sum()) / seconds,
        "live_tokens_mib": live * token / 2**20,
        "slots_mib": getattr(engine.stats, "cache_bytes", 0) / 2**20,
        "worst_case_mib": ROWS * (longest + args.limit) * token / 2**20,
        "learned_from_mib": sum(s.features.nbytes for s in buffer_of(drafter)) / 2**20,
        "preemptions": getattr(engine.stats, "preemptions", 0),
        "tokens": hash(tuple(t for c in completions for t in c.token_ids)),
    }
    print(json.dumps(figures))


def drafter_of(folder: str, model, config: SpecConfig) -> EagleDrafter:
    """The head in `folder`, which guesses, and features are collected to train it."""
    head, ids, _ = load_head(folder, HeadConfig.for_target(model.config))
    scaled, view = head.folded(), PolicyView(model)
    head.load_state_dict(scaled)
    view.draft_ids = ids
    drafter = EagleDrafter(head.eval(), view, FeatureBuffer(config.max_feature_tokens))
    drafter.ready = True
    return drafter


def buffer_of(drafter: EagleDrafter | None) -> list:
    """What is learned from."""
    return [] if drafter is None else getattr(drafter, "collector", drafter).buffer.samples


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, metavar="DIR")
    parser.add_argument("--max-cache-gib", type=float)
    parser.add_argument("--tail", type=float, default=0.9, help="of the lengths; a smaller exponent is heavier")
    parser.add_argument("--draft", metavar="DIR", help="a head that guesses too")
    parser.add_argument("--gamma", type=int, default=0, help="its guesses per step")
    parser.add_argument("--limit", type=int, default=32768, help="new tokens that a row might have")
    return parser


if __name__ == "__main__":
    main()
