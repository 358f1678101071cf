#!/usr/bin/env bash
# One would expect: a cached decode step of Nemotron-H computes what a pass over the whole sequence computes, up to
# rounding, as for other models.
#
# What happens: a whole pass keeps the Mamba-2 time steps at `config.time_step_min` (0.001) or above; the step of one token,
# as transformers computes it in torch, does not. Where a layer's bias makes its time steps smaller than that, cached
# decoding, so `generate` too, follows another recurrence than the pass that a trainer takes for log-probs.
#
# Seen with: transformers 5.17.0 and 5.24.0, torch 2.13.0, Python 3.11, on Linux, without mamba-ssm's kernels, 2026-11-28: the
# logits after two cached tokens are off by 7.5e-3 of their standard deviation with time steps of 1e-4, and by 1.1e-5 with
# steps of 0.05. The model is random and tiny; no checkpoint was looked at.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/decode.py" <<'PY'
import sys
from importlib.metadata import version

import torch
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.for_model(
    "nemotron_h", vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=96, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention", "moe"],
    mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=6, n_groups=2, chunk_size=8,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16,
)
ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


@torch.no_grad()
def apart(bias: float) -> float:
    """How far two cached steps are off from a whole pass, in standard deviations of the logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.35)
        if name.endswith("A_log"):
            torch.nn.init.constant_(parameter, -2.0)
        if name.endswith("dt_bias"):
            torch.nn.init.constant_(parameter, bias)
    whole = model(input_ids=ids, use_cache=False).logits[0, -1]
    output = model(input_ids=ids[:, :6], use_cache=True)
    for place in (6, 7):
        output = model(input_ids=ids[:, place : place + 1], past_key_values=output.past_key_values, use_cache=True)
    return float((output.logits[0, -1] - whole).abs().max() / whole.std())


small, usual = apart(-9.0), apart(-3.0)
print(f"transformers {version('transformers')}, torch {version('torch')}, time_step_min {config.time_step_min}")
print(f"time steps of about 1e-4: off by {small:.1e} standard deviations; of about 0.05: by {usual:.1e}")
sys.exit(not (small > 1e-3 and usual < 1e-3))
PY

for release in 5.17.0 5.24.0; do
    "${PYTHON:-python3}" -m venv "$folder/$release"
    "$folder/$release/bin/python" -m pip install --quiet --disable-pip-version-check \
        torch==2.13.0 numpy==2.4.6 "transformers==$release"
    if ! "$folder/$release/bin/python" -W ignore "$folder/decode.py"; then
        echo "The finding no longer holds with transformers $release."
        exit 1
    fi
done
echo "The finding holds."
