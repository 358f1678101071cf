"""For maintainers: what turns of a tool loop take that read only what is new, beside turns that read everything.

python scripts/time_turns.py --policy policies/small [--rows 8] [--json turns.json]
"""

import argparse
import json
import time
from pathlib import Path

import torch

from spec_rollout.bench.workload import load_policy
from spec_rollout.config import SpecConfig
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import SamplingParams

TURNS, FIRST, NEW, TOLD = 5, 2000, 64, 48
"""Turns of a conversation, tokens that it begins with, tokens drawn in each, and what a tool says to them."""


def main() -> None:
    args = _parser().parse_args()
    model = load_policy(args.policy, args.dtype, FIRST).model
    model.config.max_position_embeddings = 2 * (FIRST + TURNS * (NEW + TOLD))
    engines = {"new": RolloutEngine(model, SpecConfig(num_speculative_tokens=0))}
    engines["all"] = RolloutEngine(model, SpecConfig(num_speculative_tokens=0))
    engines["new"].keep_rows()
    figures = {name: {"turns": [], "prefill": [], "read": []} for name in engines}
    drawn = {name: [] for name in engines}
    for round_ in range(args.repeats + 1):
        for name, engine in engines.items():
            engine.forget()
            engine.stats = type(engine.stats)()
            seconds, tokens = _talk(engine, args.rows, round_)
            drawn[name].append(tokens)
            if round_:  # the first round warms up
                figures[name]["turns"].append(seconds)
                figures[name]["prefill"].append(engine.stats.prefill_s)
                figures[name]["read"].append(engine.stats.prefilled_tokens)
    figures["same_tokens"] = drawn["new"] == drawn["all"]
    figures |= {"rows": args.rows, "threads": torch.get_num_threads(), "torch": torch.__version__}
    figures["cache_gib"] = {name: engine.stats.cache_bytes / 2**30 for name, engine in engines.items()}
    print(json.dumps(figures))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


def _talk(engine: RolloutEngine, rows: int, seed: int) -> tuple[list[float], list]:
    """Seconds of each turn of a conversation, and the tokens drawn."""
    generator = torch.Generator().manual_seed(seed)
    size = engine.target.vocab_size
    prompts = [torch.randint(size, (FIRST,), generator=generator).tolist() for _ in range(rows)]
    seconds, drawn = [], []
    for turn in range(TURNS):
        began = time.perf_counter()
        completions = engine.generate(prompts, SamplingParams(max_new_tokens=NEW), seed=(seed, turn))
        seconds.append(time.perf_counter() - began)
        drawn.append([c.token_ids for c in completions])
        said = torch.randint(size, (rows, TOLD), generator=generator).tolist()
        prompts = [[*p, *c.token_ids, *t] for p, c, t in zip(prompts, completions, said, strict=True)]
    return seconds, drawn


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, metavar="DIR")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    return parser


if __name__ == "__main__":
    main()
