"""Configurations of tiny policies, by architecture."""

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MAIN = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "tie_word_embeddings": False, **MIXED},
    "gpt2": {"n_inner": 48},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, **MIXED},
}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
FURTHER = {
    "cohere2": {"logit_scale": 1.0, **MIXED},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "first_k_dense_replace": 1,
        **ROUTED,
    },
    "ernie4_5": {"head_dim": 8},
    "exaone4": MIXED,
    "gemma2": {"head_dim": 8, "tie_word_embeddings": False, "sliding_window": 8},
    "glm4": {"head_dim": 8},
    "glm4_moe": {"head_dim": 8, **ROUTED},
    "gpt_neox": {},
    "granite": {},
    "hunyuan_v1_dense": {"head_dim": 8},
    "llama4_text": {
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "attention_chunk_size": 5,
        "no_rope_layers": [1, 0],
    },
    "olmo2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
    "phi3": {},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 8},
}
ARCHITECTURES = {**MAIN, **FURTHER}
RECURRENT = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_hidden_layers": 3}
DELTA_RULE = {
    **RECURRENT,
    "head_dim": 8,
    "rms_norm_eps": 1e-2,  # or the norm behind the recurrence magnifies rounding where its output is near 0
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 6,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
CONV = {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "block_auto_adjust_ff_dim": False}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HYBRIDS = {
    "qwen3_5_text": DELTA_RULE,
    "qwen3_next": {**DELTA_RULE, **EXPERTS, "shared_expert_intermediate_size": 16},
    "olmo_hybrid": {**DELTA_RULE, "linear_num_value_heads": 2},
    "kimi_linear": {
        **RECURRENT,
        "rms_norm_eps": 1e-2,
        "linear_num_heads": 2,
        "linear_head_dim": 8,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
        "num_local_experts": 4,
        **EXPERTS,
    },
    "lfm2": CONV,
    "bamba": {**MAMBA, "attn_layer_indices": [1], "num_hidden_layers": 3},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "head_dim": 8},
    "granitemoehybrid": {**MAMBA, **RECURRENT, "num_local_experts": 0, "shared_intermediate_size": 48},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 6,
        "n_groups": 2,
        "chunk_size": 8,
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
}
"""Layers with recurrent states beside those with attention."""
RELATIVES = {
    "qwen3_5_moe_text": HYBRIDS["qwen3_next"],
    "lfm2_moe": {**CONV, **EXPERTS, "num_dense_layers": 1},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "num_hidden_layers": 3,
        "mamba_d_state": 6,
        "mamba_ngroups": 2,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "chunk_size": 8,
        "num_mem_blocks": 1,
        "use_mem_rope": True,
        "num_key_value_heads": 4,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 6, "n_groups": 2, "chunk_size": 8},
}
"""The same recurrences in other models."""
