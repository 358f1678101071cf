"""The weights of layers as the compiled halves take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from spec_rollout.engine.lean.halves import ACTIVATIONS, AFTER, BEFORE, BEFORE_IN_HEAD, Form
from spec_rollout.engine.lean.norms import epsilon
from spec_rollout.engine.lean.products import tokens_as_columns
from spec_rollout.engine.lean.weights import Family, LayerWeights

NORMS = ("attention_out", "mlp_in", "mlp_out", "norm", "hidden_norm", "q_norm", "k_norm")


class HalfWeights(NamedTuple):
    """A half's form, and its weights in the form's order: the policy's own tensors, not copies."""

    form: Form
    weights: list[Tensor]


Halves = tuple[HalfWeights, HalfWeights]
"""Before and after the attention."""


def halves_of(layer: nn.Module, family: Family, read: LayerWeights, act: str) -> Halves | None:
    """Both halves of a decoder layer of which `read` is known already; None where no program can take them, as with an
    adapter's modules, in other dtypes than float32 and elsewhere than on a CPU."""
    attention, mlp = layer.self_attn, layer.mlp
    names = {"qkv": "qkv_proj"} if hasattr(attention, "qkv_proj") else {n: f"{n}_proj" for n in "qkv"}
    before = {name: getattr(attention, long) for name, long in names.items()}
    before |= _there(layer, norm=family.attention_in) | _there(attention, q_norm="q_norm", k_norm="k_norm")
    names = {"both": "gate_up_proj"} if hasattr(mlp, "gate_up_proj") else {"gate": "gate_proj", "up": "up_proj"}
    after = {
        "o": attention.o_proj,
        **{name: getattr(mlp, long) for name, long in names.items()},
        "down": mlp.down_proj,
    }
    after |= _there(layer, attention_out=family.attention_out, mlp_in=family.mlp_in, mlp_out=family.mlp_out)
    common = {"heads": read.heads, "width": attention.o_proj.out_features, "offset": family.norm_offset}
    first = half(BEFORE, before, rope=read.rope, **common)
    second = half(AFTER, after, multiplier=float(read.residual_multiplier), act=act, **common)
    return (first, second) if first and second else None


def halves_of_head(layer: nn.Module, heads: tuple[int, int, int], width: int) -> Halves | None:
    """The same of the draft head's layer."""
    attention, mlp = layer.self_attn, layer.mlp
    before = {n: getattr(attention, f"{n}_proj") for n in "qkv"}
    before |= {"norm": layer.input_layernorm, "hidden_norm": layer.hidden_norm}
    after = {"gate": mlp.gate_proj, "up": mlp.up_proj, "o": attention.o_proj, "down": mlp.down_proj}
    after |= {"mlp_in": layer.post_attention_layernorm}
    first = half(BEFORE_IN_HEAD, before, heads=heads, width=width)
    second = half(AFTER, after, heads=heads, width=width)
    return (first, second) if first and second else None


def half(kind: str, modules: dict[str, nn.Module], act: str = "silu", **options) -> HalfWeights | None:
    """The half `kind` of the named linear layers and norms."""
    linear = {name: module for name, module in modules.items() if name not in NORMS}
    norms = {name: module for name, module in modules.items() if name in NORMS}
    if any(type(module) is not nn.Linear for module in linear.values()) or act not in ACTIVATIONS:
        return None
    eps = {float(epsilon(norm)) for norm in norms.values()}
    tensors = {f"{name}.weight": module.weight.detach() for name, module in linear.items()}
    tensors |= {f"{n}.bias": module.bias.detach() for n, module in linear.items() if module.bias is not None}
    tensors |= {name: norm.weight.detach() for name, norm in norms.items()}
    if len(eps) > 1 or not all(_plain(tensor) for tensor in tensors.values()):
        return None
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items())
    columns = tokens_as_columns(next(iter(tensors.values())))
    form = Form(kind, shapes=shapes, eps=eps.pop() if eps else 0.0, act=act, columns=columns, **options)
    return HalfWeights(form, [*tensors.values()])


def _there(holder: nn.Module, **names: str | None) -> dict[str, nn.Module]:
    found = {short: getattr(holder, name, None) for short, name in names.items() if name}
    return {name: module for name, module in found.items() if module is not None}


def _plain(tensor: Tensor) -> bool:
    """Whether compiled code may read it by its address."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
