"""The parts of a decoder layer as the lean pass uses them, read off the module tree."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from spec_rollout.engine.lean.norms import Norm, read_head_norm, read_norm
from spec_rollout.engine.lean.projections import GatedMLP, Projection


@dataclass(frozen=True)
class Family:
    """What distinguishes one architecture of the Llama shape from another.

    `attention_out` and `mlp_out` norm what is added to the residual stream, `attention_in` and `mlp_in` what is read
    from it; None where there is no such norm. `norm_offset` is added to the norms' weights.
    """

    attention_in: str | None = "input_layernorm"
    attention_out: str | None = None
    mlp_in: str | None = "post_attention_layernorm"
    mlp_out: str | None = None
    norm_offset: float = 0.0


OUTER = Family(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
SANDWICH = Family(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    norm_offset=1.0,
)
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3"), Family()),
    **dict.fromkeys(("olmo2", "olmo3"), OUTER),
    **dict.fromkeys(("gemma2", "gemma3_text"), SANDWICH),
}
"""By `model_type`."""


@dataclass(frozen=True)
class LayerWeights:
    """One layer of the residual stream [N, H], or [H, N] (see `products`)."""

    qkv: tuple[Projection, ...]
    """Of queries, keys and values each, or of all three side by side."""
    head_norm: Norm | None
    """Of queries and keys [N, Hq + Hk, D] together."""
    whole_norms: tuple[Norm, Norm] | None
    """Of queries [N, Hq · D] and of keys, over all heads at once."""
    heads: tuple[int, int, int]
    """Query heads, key heads, their size."""
    scaling: float
    kind: str
    """The layer's type, which names its mask and its rope."""
    rope: bool
    o_proj: Projection
    mlp: GatedMLP
    attention_in: Norm | None
    attention_out: Norm | None
    mlp_in: Norm | None
    mlp_out: Norm | None
    residual_multiplier: float


def read_layer(layer: nn.Module, family: Family, kind: str, columns: bool = False) -> LayerWeights:
    """The weights of `layer` as they are now; with `columns` for a residual stream [H, N]."""
    attention = layer.self_attn
    fused = hasattr(attention, "qkv_proj")
    names = ("qkv_proj",) if fused else ("q_proj", "k_proj", "v_proj")
    size = attention.head_dim
    queries = attention.o_proj.in_features // size
    heads = (queries, queries // attention.num_key_value_groups, size)

    def norm(holder: nn.Module, name: str | None) -> Norm | None:
        module = getattr(holder, name, None) if name else None
        return None if module is None else read_norm(module, family.norm_offset, columns)

    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    whole = q_norm is not None and q_norm.weight.shape[-1] != size
    return LayerWeights(
        qkv=tuple(Projection(getattr(attention, name), columns) for name in names),
        head_norm=None if q_norm is None or whole else read_head_norm(q_norm, k_norm, heads, family.norm_offset),
        whole_norms=(norm(attention, "q_norm"), norm(attention, "k_norm")) if whole else None,
        heads=heads,
        scaling=attention.scaling,
        kind=kind,
        rope=bool(getattr(attention, "use_rope", True)),
        o_proj=Projection(attention.o_proj, columns),
        mlp=GatedMLP(layer.mlp, getattr(layer.mlp, "act_fn", None) or layer.mlp.activation_fn, columns),
        attention_in=norm(layer, family.attention_in),
        attention_out=norm(layer, family.attention_out),
        mlp_in=norm(layer, family.mlp_in),
        mlp_out=norm(layer, family.mlp_out),
        residual_multiplier=getattr(layer, "residual_multiplier", 1.0),
    )
