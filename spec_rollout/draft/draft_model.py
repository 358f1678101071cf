"""A draft that is a whole causal language model: told from a head, loaded, and refused where it cannot guess."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from spec_rollout.engine.target import Target

OF_A_HEAD = ("fc.weight", "model.fc.weight")
"""Tensors that heads of EAGLE's kind have and no language model."""


def is_language_model(folder: str | Path) -> bool:
    """Whether `folder` holds a causal language model. What cannot be read is left to the reader of heads to tell."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    index, single = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    whole = any(str(n).endswith(("ForCausalLM", "LMHeadModel")) for n in config.get("architectures") or [])
    if not whole or "draft_vocab_size" in config or not (index.exists() or single.exists()):
        return False
    if index.exists():
        return True
    with safe_open(single, framework="pt") as file:
        return not any(name in OF_A_HEAD for name in file.keys())  # noqa: SIM118


def load_draft_model(folder: str | Path, policy: Target, tokenizer: PreTrainedTokenizerBase | None) -> Target:
    """The language model in `folder`, in the policy's dtype and on its device.

    Raises:
        ValueError: it has another vocabulary than the policy, or keeps more for a row than keys and values.
        UnsupportedModelError: it cannot be decoded on ragged rows.
    """
    size = AutoConfig.from_pretrained(folder).get_text_config(decoder=True).vocab_size
    if size != policy.vocab_size:
        raise ValueError(
            f"The draft model in {folder} has a vocabulary of {size} tokens, this policy has {policy.vocab_size}: a "
            "guess must be a token of the policy. Give a model of the same family, or none to start cold."
        )
    if tokenizer is not None and any(Path(folder, name).exists() for name in ("tokenizer.json", "vocab.json")):
        _compare(folder, AutoTokenizer.from_pretrained(folder).get_vocab(), tokenizer.get_vocab())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=policy.dtype, use_safetensors=True)
    target = Target(model.to(policy.device).eval().requires_grad_(False))
    if target.recurrent:
        raise ValueError(
            f"The draft model in {folder} is a {type(model).__name__}, whose recurrent layers cannot go back to the "
            "guesses that came true. Give one with attention alone, or none to start cold."
        )
    with target.rollout():  # which proves that it can be decoded
        return target


def _compare(folder: str | Path, theirs: dict[str, int], ours: dict[str, int]) -> None:
    differing = sorted(theirs.items() ^ ours.items(), key=lambda entry: entry[1])
    if differing:
        token = differing[0][1]
        names = [next((name for name, i in known.items() if i == token), None) for known in (theirs, ours)]
        raise ValueError(
            f"The draft model in {folder} has another tokenizer than this policy: token {token} is {names[0]!r} there "
            f"and {names[1]!r} here, and {len(differing)} entries differ, of which there may be none. Give a model "
            "that shares the policy's vocabulary, or none to start cold."
        )
