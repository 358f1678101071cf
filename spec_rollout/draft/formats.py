"""What a draft head's config.json says: EAGLE-3 as vLLM and SGLang have it, or as the speculators library does."""

from __future__ import annotations

from pathlib import Path

from spec_rollout.draft.eagle import HeadConfig

ARCHITECTURE = "LlamaForCausalLMEagle3"
SPECULATORS = "speculators_model_type"
CONFIG = "config.json"


def eagle_config(folder: Path, config: dict, wanted: HeadConfig) -> HeadConfig:
    """The shape of the head in `folder` by its `config`; what it does not say is as `wanted` for the policy.

    Raises:
        ValueError: no EAGLE-3 head, or one for another policy.
    """
    if SPECULATORS in config:
        config = _from_speculators(folder, config)
    if config.get("architectures") != [ARCHITECTURE]:
        raise ValueError(
            f"{folder} holds {config.get('architectures')}, not an EAGLE-3 head ({ARCHITECTURE}). Give another "
            "draft_model_path, or none to start cold."
        )
    for name in ("hidden_size", "vocab_size"):
        if config.get(name) != getattr(wanted, name):
            raise ValueError(
                f"The draft head in {folder} was made for a policy with {name}={config.get(name)}, this policy has "
                f"{getattr(wanted, name)}. Give the draft of this policy, or none to start cold."
            )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    for name, value, served in (
        ("rope_type", kind, "default"),
        ("num_hidden_layers", config.get("num_hidden_layers", 1), 1),
        ("norm_output", config.get("norm_output", False), False),
    ):
        if value != served:
            raise ValueError(
                f"{folder / CONFIG}: {name}={value} is not supported, only {served}. Give another draft_model_path, "
                "or none to start cold."
            )
    fields = {name: config[name] for name in wanted.to_dict() if config.get(name) is not None}
    if "head_dim" not in fields and "num_attention_heads" in fields:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    fields["rope_theta"] = float(config.get("rope_theta") or rope.get("rope_theta") or wanted.rope_theta)
    layers = wanted.aux_layers[-1] + 1
    aux = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    fields["aux_layers"] = tuple(
        aux or (2, layers // 2, layers - 3)
    )  # the EAGLE-3 authors' layers, where none are named
    if not all(0 <= layer < layers for layer in fields["aux_layers"]):
        raise ValueError(
            f"The draft head in {folder} reads the layers {fields['aux_layers']}, this policy has {layers}. Give the "
            "draft of this policy, or none to start cold."
        )
    return HeadConfig(**{**wanted.to_dict(), **fields})


def _from_speculators(folder: Path, config: dict) -> dict:
    """The speculators library's config as an EAGLE-3 one; its layer adds to the normed input unless told otherwise."""
    if config[SPECULATORS] != "eagle3":
        raise ValueError(
            f"{folder} holds a {config[SPECULATORS]!r} speculator, not 'eagle3'. Give another draft_model_path, or "
            "none to start cold."
        )
    return {
        **config["transformer_layer_config"],
        "architectures": [ARCHITECTURE],
        "num_hidden_layers": 1,
        "norm_before_residual": config.get("norm_before_residual", True),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": config.get("eagle_aux_hidden_state_layer_ids")},
    }
