"""A small policy at the cost of a large one: wider, deeper, with the same things to say."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

SMALL = 1e-3
"""Size of what each added part writes, beside the policy's own embeddings."""
BOUND = 1e-4
"""Most nats per token by which the distribution may change (mean Kullback-Leibler divergence, in float32)."""
CONSTANT, UNLIKELY, LARGE = 0.01, 100.0, 1e4
"""Of the channel that keeps added tokens away: its size beside the embedding's norm, and what it takes from their
logits where the residual stream is LARGE times an embedding; more where it is smaller."""


class Shape(NamedTuple):
    """Widths of a policy; `key_width` is that of all keys of a token together."""

    layers: int
    hidden_size: int
    intermediate_size: int
    key_width: int


SHAPES = {
    "0.4b": Shape(24, 896, 4864, 128),
    "1.5b": Shape(28, 1536, 8960, 256),
    "7b": Shape(28, 3584, 18944, 512),
}
"""Those of Qwen2.5's models of about that size; the output head comes on top."""

AXES = {
    "embed_tokens": ("token", "hidden"),
    "lm_head": ("token", "hidden"),
    "q_proj": ("query", "hidden"),
    "k_proj": ("key", "hidden"),
    "v_proj": ("key", "hidden"),
    "o_proj": ("hidden", "query"),
    "gate_proj": ("inner", "hidden"),
    "up_proj": ("inner", "hidden"),
    "down_proj": ("hidden", "inner"),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "norm": ("hidden",),
    "q_norm": ("head",),
    "k_norm": ("head",),
}
"""What the axes of each module's weight stand for."""


@torch.no_grad()
def inflate(policy: PreTrainedModel, shape: Shape, vocab_size: int | None = None, seed: int = 0) -> PreTrainedModel:
    """A model of `shape` whose distribution is that of `policy`, a Qwen3, up to a small random perturbation.

    The policy's weights sit in a corner of the new ones and its layers, in order, among the new layers. Everything
    else is random: what reads is of ordinary size, what writes to the residual stream is SMALL, so that nothing that
    the policy reads changes by more. An RMS norm over more channels is made good by its weight.

    Args:
        vocab_size: tokens of the new model; those beyond the policy's are never likely. By default the policy's.

    Raises:
        ValueError: another architecture, or a shape that the policy does not fit into.
    """
    config = _config(policy, shape, vocab_size)
    index = _index(policy.config, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = type(policy)(config).to(torch.float32).eval()
    source = {name: p.float().cpu() for name, p in policy.named_parameters(remove_duplicate=False)}
    size = source["model.embed_tokens.weight"].square().mean().sqrt().item()
    spread = {
        (i + 1) * shape.layers // policy.config.num_hidden_layers - 1: i for i in range(len(policy.model.layers))
    }
    for name, weight in model.named_parameters():
        axes = AXES[name.split(".")[-2]]
        _randomise(weight, axes, size, generator)
        old = _source_of(name, source, spread)
        if old is not None:
            grown = axes == ("hidden",)
            factor = (policy.config.hidden_size / shape.hidden_size) ** 0.5 if grown else 1.0
            weight[torch.meshgrid(*(index[axis] for axis in axes), indexing="ij")] = old * factor
    if config.vocab_size > policy.config.vocab_size:
        _keep_away(model, policy.config, size)
    model.generation_config = copy.deepcopy(policy.generation_config)
    return model


def _config(policy: PreTrainedModel, shape: Shape, vocab_size: int | None):
    config, old = copy.deepcopy(policy.config), policy.config
    if config.model_type != "qwen3" or config.attention_bias:
        raise ValueError(
            f"A {config.model_type} policy cannot be inflated: make one with scripts/make_reference_policy.py, a "
            "Qwen3 without biases."
        )
    vocab_size = vocab_size or old.vocab_size
    config.update(
        {
            "num_hidden_layers": shape.layers,
            "layer_types": ["full_attention"] * shape.layers,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_attention_heads": shape.hidden_size // old.head_dim,
            "num_key_value_heads": shape.key_width // old.head_dim,
            "rms_norm_eps": old.rms_norm_eps * old.hidden_size / shape.hidden_size,
            "vocab_size": vocab_size,
            "tie_word_embeddings": old.tie_word_embeddings and vocab_size == old.vocab_size,
        }
    )
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_key_value_heads", "vocab_size")
    small = [n for n in names if getattr(config, n) < getattr(old, n)]
    if small or _group(config) < _group(old):
        name = small[0] if small else "num_attention_heads"
        raise ValueError(
            f"{name}={getattr(config, name)} is less than the policy's {getattr(old, name)}: choose a larger shape."
        )
    return config


def _group(config) -> int:
    """Queries that share a key."""
    return config.num_attention_heads // config.num_key_value_heads


def _index(old, new) -> dict[str, Tensor]:
    """Where each axis of the policy's weights goes; its queries stay with their keys."""
    head = torch.arange(old.head_dim)
    queries = torch.arange(old.num_attention_heads)
    queries = queries // _group(old) * _group(new) + queries % _group(old)
    return {
        "token": torch.arange(old.vocab_size),
        "hidden": torch.arange(old.hidden_size),
        "inner": torch.arange(old.intermediate_size),
        "head": head,
        "key": torch.arange(old.num_key_value_heads * old.head_dim),
        "query": (queries[:, None] * old.head_dim + head).flatten(),
    }


def _randomise(weight: Tensor, axes: tuple[str, ...], size: float, generator: torch.Generator) -> None:
    if len(axes) == 1:
        weight.uniform_(0.5, 1.5, generator=generator)
    elif axes[0] == "token":
        weight.normal_(0.0, SMALL * size, generator=generator)
    else:
        written = SMALL * size if axes[0] == "hidden" else 1.0
        weight.normal_(0.0, written * weight.shape[1] ** -0.5, generator=generator)


def _source_of(name: str, source: dict[str, Tensor], spread: dict[int, int]) -> Tensor | None:
    """The policy's weight that goes into `name`; None in a layer that it does not have."""
    parts = name.split(".")
    if "layers" in parts:
        place = parts.index("layers") + 1
        if int(parts[place]) not in spread:
            return None
        parts[place] = str(spread[int(parts[place])])
    return source[".".join(parts)]


def _keep_away(model: PreTrainedModel, old, size: float) -> None:
    """Give the tokens that `old` does not have logits far below all others.

    One of the added channels is the same for every token; only the last norm shows it, greatly enlarged, to the output
    head, whose added rows count it against their tokens.
    """
    channel, known = old.hidden_size, old.vocab_size
    constant = CONSTANT * size * old.hidden_size**0.5
    model.model.embed_tokens.weight[:, channel] = constant
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[channel] = SMALL
    shrink = (old.hidden_size / model.config.hidden_size) ** 0.5
    model.model.norm.weight[channel] = UNLIKELY * LARGE * size * shrink / constant
    output = model.lm_head.weight
    output[known:] *= 1 / SMALL
    output[known:, channel] = -1.0
    output[:known, channel] *= SMALL / (UNLIKELY * LARGE)


@torch.no_grad()
def divergence(policy: PreTrainedModel, other: PreTrainedModel, texts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Mean and largest KL(policy ‖ other), in nats per token, over every position of `texts`."""
    found = []
    for text in texts:
        ids = torch.tensor([list(text)])
        ours, theirs = (m(ids, use_cache=False).logits[0].float().log_softmax(-1) for m in (policy, other))
        theirs = theirs[:, : ours.shape[1]]  # the policy gives the other tokens no probability
        found.append((ours.exp() * (ours - theirs)).sum(-1).clamp(min=0))
    found = torch.cat(found)
    return found.mean().item(), found.max().item()
