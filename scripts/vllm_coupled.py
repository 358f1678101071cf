"""For maintainers: coupled verification inside vLLM: the same tokens at any number of guesses, and what it costs.

python scripts/vllm_coupled.py --policy policies/small --draft HEAD --json coupled.json [--parts same,cost,idle]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spec_rollout.backends.vllm.backend import VLLMBackend
from spec_rollout.backends.vllm.colocated import Colocated, engine_options
from spec_rollout.backends.vllm.engine import VLLMEngine
from spec_rollout.backends.vllm.starting import StartEngine
from spec_rollout.bench.workload import arithmetic_prompts, hardware, positive, positives, write_json
from spec_rollout.config import VERIFICATIONS, SpecConfig
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.gumbel_max import draw, noise_width
from spec_rollout.engine.near_ties import NEAR_TIE, USUAL
from spec_rollout.engine.noise import gumbel, request_keys
from spec_rollout.gamma import FixedGamma
from spec_rollout.records import Completion, SamplingParams

MOST, WIDEST = 5, 32
SEED = (24, 6)
TOKENS = 256
"""Of each row, where time is taken."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--draft", required=True, help="a head from pretrain-draft, trained on this policy")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", default="same,cost,idle", help="what to look at")
    parser.add_argument("--tokens", type=positive, default=20_000, help="drawn each time where tokens are compared")
    parser.add_argument("--batch-sizes", type=positives, default=[1, 8, 32], metavar="1,8,32")
    parser.add_argument("--turns", type=positive, default=9, metavar="N", help="of which the medians are taken")
    given = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    model = AutoModelForCausalLM.from_pretrained(given.policy, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.policy)
    config = SpecConfig(max_slots=WIDEST, draft_model_path=given.draft, max_num_speculative_tokens=MOST)
    guessing = VLLMBackend(model, config, starter(model))
    plain = VLLMBackend(model, SpecConfig(max_slots=WIDEST, num_speculative_tokens=0), starter(model))
    parts, figures = given.parts.split(","), {"hardware": hardware()}
    if "same" in parts:
        figures["same"] = same(model, tokenizer, guessing, plain, given.tokens)
    if "cost" in parts:
        figures["cost"] = cost(tokenizer, guessing, given)
    if "idle" in parts:
        figures["idle"] = idle(tokenizer, guessing, plain, given)
    write_json(given.json, figures)


def starter(model: torch.nn.Module) -> StartEngine:
    def start(speculative: dict | None) -> VLLMEngine:
        from vllm import LLM

        options = engine_options(speculative)
        llm = LLM(model.name_or_path, dtype="float32", max_num_seqs=WIDEST, skip_tokenizer_init=True, **options)
        return Colocated(llm, model.named_parameters)

    return start


def same(model, tokenizer, guessing: VLLMBackend, plain: VLLMBackend, tokens: int) -> list[dict]:
    """Each way to draw against vLLM without a head: completions that differ, and whether a near-tie explains them."""
    params = SamplingParams(max_new_tokens=256, eos_token_ids=(tokenizer.eos_token_id,))
    prompts = arithmetic_prompts(tokenizer, 64)
    prompts = prompts * (1 + tokens // sum(len(c.token_ids) for c in plain.generate(prompts, params, seed=SEED)))
    keys = request_keys(SEED, len(prompts))
    expected = plain.generate(prompts, params, seed=SEED)
    ways = {"0": FixedGamma(0), "3": FixedGamma(3), "5": FixedGamma(5), "schedule": None}
    found = {
        "embedded": (RolloutEngine(model, SpecConfig(max_slots=WIDEST)).generate(prompts, params, seed=SEED), 1.0)
    }
    counted: dict[str, int] = {}
    guessing.generate(prompts[:WIDEST], params)  # measures its steps
    for name, controller in ways.items():
        controller, guessing.controller = guessing.controller, controller or guessing.controller
        guessing._watchman = None
        guessing.take_stats()
        drawn, stats = guessing.generate(prompts, params, seed=SEED), guessing.take_stats()
        found[name], counted[name] = (drawn, stats.mean_acceptance_length), stats.near_ties
        guessing.controller = controller
    guessing.controller, guessing._watchman = FixedGamma(3), None
    guessing._stand_watch()
    shifted = guessing.engine.generate(prompts, params, keys=[*keys[1:], keys[0]])
    found["3, keys shifted by one"] = shifted, acceptance_length(guessing.engine)
    rows = []
    for name, (drawn, length) in found.items():
        different = [i for i, (a, b) in enumerate(zip(drawn, expected, strict=True)) if a.token_ids != b.token_ids]
        judged = [near_tie(model, prompts[i], keys[i], drawn[i], expected[i]) for i in different[:50]]
        rows.append(
            {
                "guesses": name,
                "tokens": sum(len(c.token_ids) for c in drawn),
                "completions": len(drawn),
                "different": len(different),
                "near_ties_of_the_first_50": sum(judged),
                "near_ties_drawn": counted.get(name),
                "acceptance_length": length,
            }
        )
        print(rows[-1], file=sys.stderr)
    return rows


@torch.no_grad()
def near_tie(model, prompt: list[int], key: tuple[int, int], one: Completion, other: Completion) -> bool:
    """Whether the first token in which two completions differ won by less than rounding."""
    at = next(i for i, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=False)) if a != b)
    z = model(torch.tensor([[*prompt, *one.token_ids[:at]]])).logits[0, -1]
    numbers = gumbel(torch.tensor([key], dtype=torch.int32), torch.tensor([[at]]), noise_width(len(z)))[0, 0]
    return bool(draw(z, numbers)[1] < NEAR_TIE[torch.float32] * max(1.0, z.abs().max().item() / USUAL))


def cost(tokenizer, guessing: VLLMBackend, given: argparse.Namespace) -> list[dict]:
    """Tokens per second of the two verifications, in turns."""
    guessing.generate(arithmetic_prompts(tokenizer, 1), SamplingParams(max_new_tokens=8))

    def judge(verification: str) -> VLLMEngine:
        guessing.engine.verification = guessing.engine._call("live_verify", verification)
        return guessing.engine

    rows = []
    for size in given.batch_sizes:
        for gamma in (3, 0):
            guessing.engine.control(FixedGamma(gamma))
            found = timed({v: partial(judge, v) for v in VERIFICATIONS}, tokenizer, size, given.turns)
            rows.append({"batch_size": size, "guesses": gamma, **found})
            print(rows[-1], file=sys.stderr)
    return rows


def idle(tokenizer, guessing: VLLMBackend, plain: VLLMBackend, given: argparse.Namespace) -> list[dict]:
    """Tokens per second of a vLLM whose head guesses nothing, and of one without a head, in turns."""
    for backend in (guessing, plain):
        backend.generate(arithmetic_prompts(tokenizer, 1), SamplingParams(max_new_tokens=8))
        backend.engine.control(FixedGamma(0))
    worker = guessing.engine.llm.llm_engine.model_executor.driver_worker.worker

    def head(propose: Callable) -> VLLMEngine:
        worker.model_runner.propose_draft_token_ids = propose
        return guessing.engine

    engines = {
        "head that reads every token": partial(head, worker.live_head.propose),
        "head that rests": partial(head, worker.live_head.guess),
        "no head": lambda: plain.engine,
    }
    rows = []
    for size in given.batch_sizes:
        rows.append({"batch_size": size, **timed(engines, tokenizer, size, given.turns)})
        print(rows[-1], file=sys.stderr)
    return rows


def timed(engines: dict[str, Callable[[], VLLMEngine]], tokenizer, size: int, turns: int) -> dict:
    """Medians over the turns: tokens per second, their ratios to those of the last engine, and acceptance lengths; the
    first turn warms up."""
    params = SamplingParams(max_new_tokens=TOKENS)
    prompts = arithmetic_prompts(tokenizer, size)
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    lengths: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(turns + 1):
        for name in list(engines)[:: -1 if turn % 2 else 1]:
            engine = engines[name]()
            engine.take_steps()
            began = time.perf_counter()
            drawn = engine.generate(prompts, params, keys=request_keys((turn, size), size))
            seconds = time.perf_counter() - began
            if turn:
                speeds[name].append(sum(len(c.token_ids) for c in drawn) / seconds)
                lengths[name].append(acceptance_length(engine))
    last = list(speeds.values())[-1]
    ratios = {name: [a / b for a, b in zip(found, last, strict=True)] for name, found in speeds.items()}
    return {
        kind: {name: round(statistics.median(found), 3) for name, found in figures.items()}
        for kind, figures in (("tokens_per_s", speeds), ("ratio", ratios), ("acceptance_length", lengths))
    }


def acceptance_length(engine: VLLMEngine) -> float:
    """Since it was last asked for."""
    steps = engine.take_steps()[0]
    return sum(s.emitted for s in steps) / sum(s.rows for s in steps)


if __name__ == "__main__":
    sys.exit(main())
