"""Tiny random models of the architectures that the installed transformers knows, made from their configurations."""

from __future__ import annotations

import re
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, CONTEXT, HEADS, HEAD_SIZE = 97, 96, 4, 8
WIDTH = HEADS * HEAD_SIZE
LARGEST = 5_000_000
"""Most parameters."""
SIZES = (
    (r"(decoder_)?vocab_size(_per_layer_input)?|num_embeddings", VOCAB),
    (r"(hidden|embedding|word_embed_proj|attention_hidden)_(size|dim)|d_model|n_embd|dim|embed_dim|model_dim", WIDTH),
    (r".*intermediate_size.*|.*ffn_dim|n_inner|d_ff|ffn_hidden_size|inner_dim|ffn_size", 48),
    (r"(num_hidden|n|num|decoder|encoder|num_decoder)_layers?|n_layers|num_blocks", 2),
    (r"(num|n|decoder|encoder)_(attention_)?heads?|num_query_heads|.*num_attention_heads", HEADS),
    (r"(num_key_value|num_kv|multi_query_group|n_kv|.*num_key_value)_heads?(_num)?|multi_query_group_num", 2),
    (r"max_position_embeddings|n_positions|n_ctx|max_sequence_length|context_length|max_target_positions", CONTEXT),
    (
        r"(global_|swa_)?head_dim|attention_head_dim|(swa_)?v_head_dim|qk_(nope|rope)_head_dim|kv_channels|index_head_dim",
        HEAD_SIZE,
    ),
    (r"qk_head_dim", 2 * HEAD_SIZE),
    (
        r"q_lora_rank|kv_lora_rank|o_lora_rank|rotary_dim|index_topk|sliding_window|window_size|local_attention",
        HEAD_SIZE,
    ),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_routed_experts", 4),
    (r"(num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|num_selected_experts|moe_top_k)", 2),
    (r"n_group|topk_group|n_shared_experts|num_shared_experts|first_k_dense_replace", 1),
    (r"hidden_size_per_layer_input", 8),
    (r"num_kv_shared_layers", 0),
)
"""Sizes by the names that configurations give them."""
ROPE = ("rope_theta", "partial_rotary_factor", "llama_4_scaling_beta", "original_max_position_embeddings")
"""What of a rope does not depend on the size of the heads."""
SPECIAL: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "bloom": {"n_head": 4},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_d_ssm": 64, "mamba_n_groups": 1},
    "falcon_mamba": {"state_size": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 1},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 1},
    "qwen3_next": {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8},
    "xlnet": {"n_head": 4},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}
"""What a few of them need besides."""


def architectures() -> list[str]:
    """The model types that `AutoModelForCausalLM` takes."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def make_tiny(name: str, std: float = 0.35, **options) -> PreTrainedModel:
    """A random model of type `name` whose next-token distributions are peaked and depend on the context, in float32.

    Raises:
        ValueError: it does not get tiny; or what transformers raises where a configuration does not take such sizes.
    """
    config = AutoConfig.for_model(name)
    _shrink(config)
    for option, value in {**SPECIAL.get(name, {}), **options}.items():
        setattr(config, option, value)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"it is not tiny: {size} parameters")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=std)
    return model.eval()


def _shrink(config: PreTrainedConfig) -> None:
    """Give `config` and the configurations inside it small sizes, two layers, and one of each type of layer."""
    for part in list(vars(config).values()):
        if isinstance(part, PreTrainedConfig):
            _shrink(part)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    for option, value in list(vars(config).items()):
        if option == "is_decoder":
            _set(config, option, True)
        elif option == "pad_token_id":
            _set(config, option, 0)
        elif option.endswith("_token_id") and value is not None:
            _set(config, option, 0 if option == "decoder_start_token_id" else None)
        elif value is None and option in ("head_dim", "num_key_value_heads"):
            _set(config, option, HEAD_SIZE if option == "head_dim" else HEADS)
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for pattern, size in SIZES if re.fullmatch(pattern, option)), value)
            _set(config, option, min(size, value))
        elif option == "rope_parameters" and isinstance(value, dict):
            _set(config, option, _plain_rope(value))
    if getattr(config, "kv_lora_rank", None):
        _set(config, "num_key_value_heads", HEADS)  # each head has keys of its own there
    if kinds:
        kinds = kinds if len(kinds) > 1 else 2 * kinds
        _set(config, "num_hidden_layers", len(kinds))
        _set(config, "layer_types", kinds)
    if getattr(config, "mlp_layer_types", None):
        _set(config, "mlp_layer_types", (list(dict.fromkeys(config.mlp_layer_types)) * 9)[: config.num_hidden_layers])


def _set(config: PreTrainedConfig, option: str, value: Any) -> None:
    try:
        setattr(config, option, value)
    except StrictDataclassFieldValidationError:  # it takes no None: any id will do
        setattr(config, option, 1)
    except AttributeError:  # it follows from other options
        pass


def _plain_rope(parameters: dict) -> dict:
    """Without factors that are made for other sizes."""
    if any(isinstance(value, dict) for value in parameters.values()):
        return {kind: _plain_rope(value) for kind, value in parameters.items() if isinstance(value, dict)}
    kept = {key: parameters[key] for key in ROPE if key in parameters}
    return {"rope_type": "default", **kept}
