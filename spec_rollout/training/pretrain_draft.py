"""`spec-rollout pretrain-draft`: a draft head for a policy ahead of its training, for those who want one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.config import SpecConfig
from spec_rollout.records import RefreshStats, SamplingParams
from spec_rollout.training.launch import ScriptArguments, load_split
from spec_rollout.training.sampling_params import sampling_params


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(args.policy, dtype=args.dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.policy)
    except OSError as error:
        raise SystemExit(f"--policy {args.policy} cannot be loaded: {str(error).splitlines()[0]}") from error
    try:
        rows = load_split(ScriptArguments(dataset_name=args.prompts), "train")["prompt"]
    except ValueError as error:
        raise SystemExit(f"--prompts: {error}") from error
    prompts = [prompt_ids(tokenizer, prompt) for prompt in rows]
    if not prompts or min(args.rollouts, args.batch_size, args.max_new_tokens) < 1:
        raise SystemExit(
            f"--rollouts {args.rollouts}, --batch-size {args.batch_size} and --max-new-tokens {args.max_new_tokens} "
            f"must be at least 1, and --prompts must hold at least 1 prompt, not {len(prompts)}."
        )
    eos_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    wanted = GenerationConfig(max_new_tokens=args.max_new_tokens, do_sample=True, temperature=args.temperature)
    params = sampling_params(wanted, model.generation_config, eos_ids)
    backend = EmbeddedBackend(model, SpecConfig(max_feature_tokens=args.max_feature_tokens), tokenizer)
    stats = pretrain(backend, prompts, params, args.rollouts, args.batch_size, args.out)
    rates = ", ".join(f"{rate:.2f}" for rate in stats.acceptance)
    print(f"{args.out}: acceptance by position {rates}. Use it with --draft_model_path {args.out}")
    return 0


def pretrain(
    backend: EmbeddedBackend,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    rollouts: int,
    batch_size: int,
    out: Path,
) -> RefreshStats:
    """Roll out `batch_size` prompts at a time, train for as long as each rollout took, and save after each.

    Returns the figures of the last training.
    """
    stats = RefreshStats()
    with tqdm(total=rollouts, desc="pretraining the draft", unit="rollout", file=sys.stderr) as bar:
        for turn in range(rollouts):
            first = turn * batch_size
            batch = [prompts[(first + i) % len(prompts)] for i in range(batch_size)]
            backend.generate(batch, params, seed=(turn,))
            stats = backend.refresh(backend.take_stats().seconds)
            backend.save(out)
            bar.set_postfix(loss=f"{stats.loss:.2f}", acceptance=f"{(stats.acceptance or [0.0])[0]:.2f}")
            bar.update()
    return stats


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict]) -> list[int]:
    """Token ids of a plain or a conversational prompt, as TRL's trainers tokenize it."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spec-rollout pretrain-draft", description=__doc__)
    parser.add_argument("--policy", required=True, help="folder or hub id of a causal language model")
    parser.add_argument("--prompts", required=True, help="file or dataset with a column `prompt`, or `arithmetic`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the head")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--rollouts", type=int, default=20, metavar="N")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-feature-tokens", type=int, default=SpecConfig().max_feature_tokens, metavar="N")
    return parser
