"""Which policies the lean pass knows."""

from __future__ import annotations

import inspect

from torch import nn

from spec_rollout.engine.lean.weights import FAMILIES, Family

ROPES = {"default", "linear", "llama3", "yarn"}
"""Kinds of rope whose angle depends on the position alone."""

COLLECTING = "transformers.utils.output_capturing"
"""Where the hooks come from that transformers leaves on a model whose hidden states were asked for."""

REQUIRING_GRADIENTS = {"make_inputs_require_grads", "make_inputs_require_grad"}
"""What transformers and PEFT call that hook of theirs."""

CHUNKED_LOSSES = "trl.trainer.utils"
"""Where TRL's forward comes from."""

LAYER_PARTS = {
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")),
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
}
"""Modules of a layer that may hold weights."""


def base_model(model: nn.Module) -> nn.Module:
    """The causal language model within PEFT's wrapper, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def family_of(model: nn.Module) -> Family | None:
    """How to read the layers of `model`; None for a policy that the lean pass does not know.

    Only transformers' own, unchanged classes are known, and every weight of a layer must have its place: a module put
    in the place of another, a hook, a weight that we would leave out, and the policy goes through its own forward.
    """
    base = base_model(model)
    config = base.config
    family = FAMILIES.get(getattr(config, "model_type", None))
    if family is None or getattr(model, "prompt_encoder", None) or not _ropes_known(config):
        return None
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "use_bidirectional_attention", False):
        return None
    decoder = base.get_decoder()
    if any(_foreign(module) for module in (base, decoder, *decoder.layers, decoder.norm, decoder.rotary_emb)):
        return None
    if any(_hooked(module) or not _own_forward(module, module is base) for module in model.modules()):
        return None
    if not all(_layer_known(layer, family) for layer in decoder.layers):
        return None
    return family if _of_one_kind(base) else None


def takes_layer_type(rotary: nn.Module) -> bool:
    """Whether a rotary embedding has angles for each kind of layer."""
    return "layer_type" in inspect.signature(type(rotary).forward).parameters


def _layer_known(layer: nn.Module, family: Family) -> bool:
    norms = [
        getattr(layer, name, None)
        for name in (family.attention_in, family.attention_out, family.mlp_in, family.mlp_out)
        if name
    ]
    norms += [m for m in (getattr(layer.self_attn, n, None) for n in ("q_norm", "k_norm")) if m is not None]
    if any(norm is None or _foreign(norm) or not type(norm).__name__.endswith("RMSNorm") for norm in norms):
        return False
    if _foreign(layer.self_attn) or _foreign(layer.mlp):
        return False
    return all(
        any(name == part or name.startswith(f"{part}.") for part in LAYER_PARTS)
        for name, _ in layer.named_parameters()
        for name in (name.rpartition(".")[0],)
    )


def _own_forward(module: nn.Module, is_base: bool) -> bool:
    """Whether `module` computes what its class does. Around the forward of a causal language model TRL lays one of its
    own, which is the original but for losses that it computes in chunks."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return True
    function = getattr(forward, "__func__", forward)
    if not is_base or getattr(function, "__globals__", {}).get("__name__") != CHUNKED_LOSSES:
        return False
    original = inspect.getclosurevars(function).nonlocals.get("original_forward")
    return getattr(original, "__func__", None) is type(module).forward


def _of_one_kind(base: nn.Module) -> bool:
    """Whether embedding, layers, norm and output head compute in one dtype on one device, and no head is in float32
    over a bfloat16 policy."""
    decoder = base.get_decoder()
    parts = [decoder.embed_tokens, decoder.norm, base.get_output_embeddings()]
    for layer in decoder.layers:
        parts += [module for name, module in layer.named_modules() if name in LAYER_PARTS]
    return len({(part.weight.dtype, part.weight.device) for part in parts}) == 1


def _foreign(module: nn.Module) -> bool:
    return not type(module).__module__.startswith("transformers.models.")


def _hooked(module: nn.Module) -> bool:
    """Whether something listens to `module`, aside from what changes nothing of a pass without gradients: the
    collecting of hidden states, and what makes embeddings require gradients, as for checkpointing."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(
        getattr(hook, "__module__", None) != COLLECTING and getattr(hook, "__name__", None) not in REQUIRING_GRADIENTS
        for hook in hooks
    )


def _ropes_known(config) -> bool:
    """Whether angles depend on the position alone, and turn the whole of each head."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]
    parts = [config.partial_rotary_factor] if hasattr(config, "partial_rotary_factor") else []
    parts += [kind.get("partial_rotary_factor") for kind in kinds]
    whole = all(part in (None, 1.0) for part in parts)
    return whole and bool(kinds) and all(kind.get("rope_type", "default") in ROPES for kind in kinds)
