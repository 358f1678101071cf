"""The read-back of an MTP head: `readback`, for a layer of the policy's own kind, with experts or without."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from spec_rollout.backends.vllm.readback import mean_response, response, stimulus
from spec_rollout.draft.mtp_names import LAYER, names_in

JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""vLLM's layers, and those of a checkpoint that each of them is made of."""
VLLMS = {
    "eh_proj": "fc",
    "enorm": "pre_fc_norm_embedding",
    "hnorm": "pre_fc_norm_hidden",
    "shared_head.norm": "final_norm",
    "norm": "final_norm",
}
"""Modules of vLLM's MTP layers by the names that `MtpHead` has for them, where it has others."""
ROWS = 16
"""Inputs whose responses are averaged: some layers have a single output, whose rounding says little."""
SHARED = "shares the policy's embedding and output head"


def probe_mtp(tensors: dict[str, Tensor]) -> dict[str, float]:
    """How the layers of a head respond, by their names in `MtpHead`, from its tensors, named as on disk."""
    own = {name.removeprefix(LAYER): tensor.float() for name, tensor in _own(tensors).items()}
    found = {SHARED: 1.0}
    for joined, parts in JOINED.items():
        for kind in ("weight", "bias"):
            ends = [f"{part}.{kind}" for part in parts]
            for begin in sorted({name.removesuffix(ends[0]) for name in own if name.endswith(ends[0])}):
                own[f"{begin}{joined}.{kind}"] = torch.cat([own.pop(begin + end) for end in ends])
    for name in [name for name in own if name.endswith("experts.gate_up_proj")]:
        base = name.removesuffix(".gate_up_proj")
        found[base] = _of_experts(own.pop(name), own.pop(f"{base}.down_proj"))
    return found | {name: _of_weight(weight) for name, weight in own.items()}


def measured_mtp(draft: nn.Module, policy: nn.Module) -> dict[str, float]:
    """The same of the first MTP layer of vLLM's `draft`, beside the `policy` that it guesses for."""
    layers = draft.model.layers
    number = next(iter(layers)) if isinstance(layers, nn.ModuleDict) else "0"
    heads = [m for n, m in draft.named_modules() if n.endswith(("lm_head", "shared_head.head"))]
    embeds = draft.model.embed_tokens is policy.model.embed_tokens
    found = {SHARED: float(embeds and all(head is policy.lm_head for head in heads))}
    for name, module in _of_first(draft.model.named_modules(), number):
        if hasattr(module, "w13_weight"):
            found[name.removesuffix(".routed_experts")] = _through_experts(module)
            continue
        own = dict(module.named_parameters(recurse=False))
        if hasattr(module, "quant_method"):
            found[f"{name}.weight"] = response(module, rows=ROWS)
            own.pop("weight", None)
        found |= {f"{name}.{kind}": _of_weight(weight.float()) for kind, weight in own.items()}
    return found


def _of_first(modules: Iterable[tuple[str, nn.Module]], number: str) -> Iterable[tuple[str, nn.Module]]:
    """The modules of the layer `number` and those that all layers share, by their names in `MtpHead`."""
    for name, module in modules:
        if name.startswith("layers.") and not name.startswith(f"layers.{number}."):
            continue
        short = re.sub(r"^layers\.\d+\.(mtp_block\.)?", "", name)
        if not short.endswith(("embed_tokens", "shared_head.head", "shared_head")):
            yield VLLMS.get(short, short), module


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` under the names of `MtpHead`."""
    numbers = (re.match(r"model\.layers\.(\d+)\.", name) for name in tensors)
    names = names_in(tensors, next((int(number[1]) for number in numbers if number), 0))
    return names.own(tensors)


def _of_weight(weight: Tensor) -> float:
    return weight.abs().mean().item() if weight.dim() == 1 else mean_response(weight, rows=ROWS)


def _of_experts(gate_up: Tensor, down: Tensor) -> float:
    """Of each expert on its own, from [E, 2 I, H] and [E, H, I]."""
    given = stimulus(0, gate_up.shape[2]).to(gate_up.device)
    gate, up = (given @ gate_up.mT).chunk(2, -1)
    return ((nn.functional.silu(gate) * up) @ down.mT).abs().mean().item()


def _through_experts(layer: nn.Module) -> float:
    """The same by vLLM's kernel: a row for each expert."""
    count, like = len(layer.w13_weight), layer.w13_weight
    given = stimulus(0, layer.hidden_size).to(device=like.device, dtype=like.dtype).repeat(count, 1)
    ids = torch.arange(count, dtype=torch.int32, device=like.device)[:, None]
    ones = torch.ones(count, 1, device=like.device)
    output = layer.quant_method.apply(layer, given, ones, ids, None, None)
    return output.float().abs().mean().item()
