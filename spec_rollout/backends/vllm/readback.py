"""A read-back that needs no weights: how the layers of a draft respond to a fixed input.

On the trainer's side from what was pushed, on vLLM's through its own layers: vLLM repacks weights for its kernels, on
a CPU so that they cannot be read.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LINEAR = {
    "fc": ("fc.weight",),
    "qkv_proj": tuple(f"midlayer.self_attn.{part}_proj.weight" for part in "qkv"),
    "o_proj": ("midlayer.self_attn.o_proj.weight",),
    "gate_up_proj": ("midlayer.mlp.gate_proj.weight", "midlayer.mlp.up_proj.weight"),
    "down_proj": ("midlayer.mlp.down_proj.weight",),
}
"""vLLM's layers, and the weights of a checkpoint that each of them is made of."""


def probe(tensors: dict[str, Tensor], place: dict[str, float] | None = None) -> dict[str, float]:
    """How the layers of an EAGLE-3 head respond, by name, from the weights of its checkpoint.

    Args:
        place: of a worker among those that share the head, as its `live_probe` tells it; None for one that has it all.
    """
    place = place or {}
    rank, ranks, replicas = (
        int(place.get(name, least)) for name, least in (("rank", 0), ("ranks", 1), ("kv_replicas", 1))
    )
    found = {}
    for name, parts in LINEAR.items():
        weights = [tensors[part].float() for part in parts]
        if name in ("qkv_proj", "gate_up_proj"):  # by their outputs; several workers may hold the same key heads
            few = [replicas if ".k_proj" in part or ".v_proj" in part else 1 for part in parts]
            weights = [w.chunk(ranks // n, 0)[rank // n] for w, n in zip(weights, few, strict=True)]
        if name in ("o_proj", "down_proj"):  # by their inputs
            width = weights[0].shape[1] // ranks
            found[name] = mean_response(weights[0].chunk(ranks, 1)[rank], rank * width)
        else:
            found[name] = mean_response(torch.cat(weights))
    if "lm_head.weight" in tensors:
        begin = int(place.get("rows_from", 0))
        rows = tensors["lm_head.weight"][begin:].float()
        found["lm_head"] = mean_response(rows[: int(place.get("rows", len(rows)))])
    if "d2t" in tensors:
        found["d2t"] = tensors["d2t"].float().mean().item()
    for name, tensor in tensors.items():
        short = name.removesuffix(".weight").split(".")[-1]
        if short.endswith("norm"):
            found[short] = tensor.float().abs().mean().item()
    return found


def measured(draft: nn.Module) -> dict[str, float]:
    """The same of the layers of vLLM's `draft`, or of a worker's shard of them, and the shard's place."""
    attention = draft.model.layers[0].self_attn
    rows = draft.lm_head.shard_indices
    found: dict[str, float] = {
        "rank": attention.qkv_proj.tp_rank,
        "ranks": attention.qkv_proj.tp_size,
        "kv_replicas": attention.qkv_proj.num_kv_head_replicas,
        "rows_from": rows.org_vocab_start_index,
        "rows": rows.num_org_elements,
    }
    found["lm_head"] = response(draft.lm_head, rows.num_org_elements)
    if getattr(draft, "draft_id_to_target_id", None) is not None:
        found["d2t"] = draft.draft_id_to_target_id.float().mean().item()
    for name, module in draft.named_modules():
        short = name.split(".")[-1]
        if short in LINEAR:
            found[short] = response(module)
        elif short.endswith("norm"):
            found[short] = module.weight.float().abs().mean().item()
    return found


def stimulus(begin: int, width: int, rows: int = 1) -> Tensor:
    # Rows of unlike frequencies: shifted ones are combinations of two, which a single output may all but miss.
    places = torch.arange(begin, begin + width, dtype=torch.float32)
    return (places * torch.arange(1, rows + 1)[:, None]).cos()


def mean_response(weight: Tensor, begin: int = 0, rows: int = 1) -> float:
    given = stimulus(begin, weight.shape[1], rows).to(weight.device)
    return nn.functional.linear(given, weight).abs().mean().item() if len(weight) else 0.0


def response(layer: nn.Module, size: int | None = None, rows: int = 1) -> float:
    """Of the first `size` outputs of a linear layer of vLLM's, or of an output head, by the kernel that serves it, to
    so many inputs. One that is shared out by its inputs answers to those that it has."""
    like = next(layer.parameters())
    width = layer.input_size if hasattr(layer, "input_size") else layer.embedding_dim
    own = getattr(layer, "input_size_per_partition", width)
    begin = layer.tp_rank * own if own != width else 0
    given = stimulus(begin, own, rows).to(device=like.device, dtype=like.dtype)
    output = layer.quant_method.apply(layer, given)
    return output[:, :size].float().abs().mean().item() if size != 0 else 0.0
