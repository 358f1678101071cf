"""What the checks and benchmarks run on: a policy from disk, prompts, and a head warmed up on them."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from spec_rollout.backends import hub
from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.config import SpecConfig
from spec_rollout.records import RefreshStats, SamplingParams
from spec_rollout.tasks.arithmetic import VARIED, Style, problems
from spec_rollout.training.launch import ScriptArguments, load_split

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZED = "quantized"
"""In the place of a draft's folder: the policy itself in 8 bit."""
DRAFT_HELP = (
    "a head from pretrain-draft, a causal language model with the policy's vocabulary, or 'quantized', the policy "
    "itself in 8 bit; by default a head learns first"
)
WARM_UP_PROMPTS, WARM_UP_ROUNDS = 64, 5


class Policy(NamedTuple):
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    params: SamplingParams


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", required=True, help="folder or hub id of a causal language model")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")


def draft_options(draft: str | None) -> dict:
    """What `SpecConfig` takes for a `draft`, as DRAFT_HELP describes it."""
    return {"draft_model_path": None if draft == QUANTIZED else draft, "draft_quantized": draft == QUANTIZED}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is out of range: it must be at least 1")
    return value


def positives(text: str) -> list[int]:
    """A comma-separated list of positive integers."""
    return [positive(item) for item in text.split(",")]


def load_policy(name: str, dtype: str, max_new_tokens: int) -> Policy:
    """The policy on the first GPU if there is one, sampled at T = 1.

    Raises:
        SystemExit: nothing that can be loaded is there; the message says so.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        hub.require(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype]).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--policy {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [tokenizer.eos_token_id if eos is None else eos]
    return Policy(model, tokenizer, SamplingParams(max_new_tokens=max_new_tokens, eos_token_ids=tuple(eos)))


def arithmetic_prompts(
    tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0, style: Style = VARIED
) -> list[list[int]]:
    """Token ids of held-out arithmetic problems."""
    return [tokenizer(p.prompt)["input_ids"] for p in problems("heldout", count, seed, style)]


def load_prompts(tokenizer: PreTrainedTokenizerBase, name: str) -> list[list[int]]:
    """Token ids of the prompts in a file or dataset with a column `prompt`, as TRL's trainers tokenize them.

    Raises:
        SystemExit: it is not there, cannot be read, or holds no prompts.
    """
    try:
        rows = load_split(ScriptArguments(dataset_name=name), "train")["prompt"]
    except ValueError as error:
        raise SystemExit(f"--prompts: {error}") from error
    return [_prompt_ids(tokenizer, prompt) for prompt in rows]


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict]) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def warm_backend(policy: Policy, config: SpecConfig, style: Style = VARIED) -> EmbeddedBackend:
    """A backend whose head has learned, from no checkpoint, on a few rollouts, as it would have after as many steps of
    a training run in which it may learn for as long as the rollouts take."""
    backend = EmbeddedBackend(policy.model, replace(config, draft_ngrams=False), policy.tokenizer)
    seeds = range(1000, 1000 + WARM_UP_ROUNDS)
    batches = [arithmetic_prompts(policy.tokenizer, WARM_UP_PROMPTS, seed, style) for seed in seeds]
    list(warm_up(backend, batches, policy.params))
    return backend


def warm_up(
    backend: EmbeddedBackend, batches: Sequence[Sequence[Sequence[int]]], params: SamplingParams
) -> Iterator[RefreshStats]:
    """Roll out each of `batches` and let the head learn for as long as that took; yields each training's figures."""
    with tqdm(batches, desc="training the draft", unit="rollout", file=sys.stderr) as bar:
        for turn, prompts in enumerate(bar):
            backend.generate(prompts, params, seed=(turn,))
            stats = backend.refresh(backend.take_stats().seconds)
            bar.set_postfix(loss=f"{stats.loss:.2f}", acceptance=f"{(stats.acceptance or [0.0])[0]:.2f}")
            yield stats


def hardware() -> dict:
    """What a figure was measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def write_json(path: Path | None, figures: dict) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Print a table; numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    out = Table(*header, box=None, header_style="bold")
    for column in out.columns:
        column.justify = "right"
    for row in rows:
        out.add_row(
            *("–" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row)
        )
    Console().print(out)
