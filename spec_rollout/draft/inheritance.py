"""A new head begins with layers of the policy: how to read its embeddings and its states need not be learned again."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.policy_view import PolicyView, decoder_layers

QUERIES, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")


def head_config(model: nn.Module) -> HeadConfig:
    """The shape of a new head for the policy `model`: as wide as the layer that it inherits, where it can."""
    config = HeadConfig.for_target(model.config.get_text_config(decoder=True))
    layers = decoder_layers(model)
    found = _projections(layers[donor_index(config)]) if layers else {}
    if all(name in found for name in MLP):
        config = replace(config, intermediate_size=found["gate_proj"].shape[0])
    if all(name in found for name in QUERIES):
        config = replace(config, head_dim=found["q_proj"].shape[0] // config.num_attention_heads)
    return config


def read_by_head(model: nn.Module) -> list[nn.Module]:
    """The parts of the policy `model` whose weights a head borrows or begins with, and its training reads."""
    parts = [model.get_input_embeddings(), model.get_output_embeddings()]
    layers = decoder_layers(model) or []
    config = HeadConfig.for_target(model.config.get_text_config(decoder=True))
    return [*parts, *(layers[i] for i in sorted({0, donor_index(config)}) if layers)]


@torch.no_grad()
def inherit(head: EagleHead, view: PolicyView, features: Tensor, tokens: Tensor) -> list[str]:
    """Copy the policy into `head`, whose features have been measured (`EagleHead.fit_scale`).

    The half of q, k and v that reads the embedding becomes that of the first layer; the half that reads the feature,
    and the rest, becomes that of the layer behind the lowest feature: early layers put a token and its past together,
    which is what a head does first. (With the last one a head of the same policy learned more slowly, with random
    weights more slowly yet: docs/measured.md.)

    Args:
        features: [N, n_aux * H or more], the policy's at some entries of rollouts.
        tokens: [N], the tokens that follow there.

    Returns:
        What no layer has in the shape that the head needs: of "attention" and "MLP". It stays as it was.
    """
    layers = decoder_layers(view.model)
    if not layers:
        return ["attention", "MLP"]
    layer, width = head.midlayer, head.config.hidden_size
    first, donor = layers[0], layers[donor_index(head.config)]
    found = _projections(donor)
    scale = float(head.feature_scale[-1])  # what the layer adds is to be as large, beside the scaled feature
    missing = []
    if _has_queries(first, head) and _has_queries(donor, head) and _fits(found, "o_proj", layer.self_attn.o_proj):
        fused = head.fuse(features[:, : head.fc.in_features].float() * head.feature_scale)
        _take_norm(layer.hidden_norm.weight, donor, "input_layernorm")
        _take_norm(layer.input_layernorm.weight, first, "input_layernorm")
        _take_queries(head, donor, layer.hidden_norm(fused), slice(width, None))
        _take_queries(head, first, layer.input_layernorm(view.embed(tokens).float()), slice(width))
        layer.self_attn.o_proj.weight.copy_(found["o_proj"] * scale)
    else:
        missing.append("attention")
    if all(_fits(found, name, getattr(layer.mlp, name)) for name in MLP):
        for name in MLP:
            getattr(layer.mlp, name).weight.copy_(found[name])
        layer.mlp.down_proj.weight *= scale
        _take_norm(
            layer.post_attention_layernorm.weight, donor, "pre_feedforward_layernorm", "post_attention_layernorm"
        )
    else:
        missing.append("MLP")
    return missing


def donor_index(config: HeadConfig) -> int:
    """Which of the policy's layers a head inherits: the one behind its lowest feature."""
    return config.aux_layers[0]


def _has_queries(layer: nn.Module, head: EagleHead) -> bool:
    """Whether q, k and v are there in the head's shape, with a norm behind them that can be made up for, or none."""
    found = _projections(layer)
    places = [getattr(head.midlayer.self_attn, name).weight for name in QUERIES]
    if not all(
        name in found and found[name].shape == (len(place), head.config.hidden_size)
        for name, place in zip(QUERIES, places, strict=True)
    ):
        return False
    norms = [(_norm_behind(layer, name), len(place)) for name, place in zip(QUERIES, places, strict=True)]
    return all(norm is None or _norm_size(norm) in (size, head.config.head_dim) for norm, size in norms)


def _take_queries(head: EagleHead, donor: nn.Module, x: Tensor, half: slice) -> None:
    """The donor's q, k and v become the `half` of the head's that reads `x` [N, H]. A norm that the donor has behind
    them, and a head has not, is made up for by the mean size of each output."""
    weights = _projections(donor)
    for name in QUERIES:
        weight, norm = weights[name].float(), _norm_behind(donor, name)
        if norm is not None:
            raw = x @ weight.T  # [N, D]
            normed = norm(raw.to(norm.weight.dtype).view(len(raw), -1, _norm_size(norm))).reshape(raw.shape).float()
            weight = weight * (normed.square().mean(0) / raw.square().mean(0).clamp(min=1e-12)).sqrt()[:, None]
        getattr(head.midlayer.self_attn, name).weight[:, half] = weight


def _norm_behind(layer: nn.Module, name: str) -> nn.Module | None:
    """The norm of what `name` puts out, such as q_norm, k_layernorm or query_layernorm."""
    for path, module in layer.named_modules():
        own = path.rpartition(".")[2]
        if own.startswith(name[0]) and own.endswith("norm"):
            return module
    return None


def _norm_size(norm: nn.Module) -> int | None:
    weight = getattr(norm, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.ndim == 1 else None


def _projections(layer: nn.Module) -> dict[str, Tensor]:
    """A layer's matrices [out, in] by their usual names; what occurs twice, as in experts, is left out."""
    found: dict[str, list[Tensor]] = {}
    for path, module in layer.named_modules():
        name, weight = path.rpartition(".")[2], getattr(module, "weight", None)
        if name in (*QUERIES, "o_proj", *MLP) and isinstance(weight, Tensor) and weight.ndim == 2:
            found.setdefault(name, []).append(weight.detach())
    return {name: weights[0] for name, weights in found.items() if len(weights) == 1}


def _fits(found: dict[str, Tensor], name: str, place: nn.Linear) -> bool:
    return name in found and found[name].shape == place.weight.shape


def _take_norm(weight: Tensor, donor: nn.Module, *names: str) -> None:
    """The scale [H] of the donor's first norm of that name, seen by what it does: some add 1 to their weights."""
    norm = next((getattr(donor, name) for name in names if hasattr(donor, name)), None)
    if norm is not None:
        sign = torch.ones_like(weight, dtype=norm.weight.dtype)
        sign[1::2] = -1  # of magnitude 1, and of mean 0 for norms that subtract that
        weight.copy_((norm(sign[None])[0] - norm(-sign[None])[0]) / 2 * sign)
