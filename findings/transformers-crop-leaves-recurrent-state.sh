#!/usr/bin/env bash
# One would expect: after `cache.activate_past_recording()`, as transformers' assisted decoding calls it, `cache.crop(-n)`
# puts a cache back to where it was n tokens ago, or refuses. Without recording it does refuse, with a RuntimeError.
#
# What happens: in models with recurrent layers beside attention (the gated delta rule of Qwen3-Next and Qwen3.5) it
# returns quietly. Keys, values and the inputs of the convolutions are rolled back, and `get_seq_length()` is right, but the
# recurrent states still hold the removed tokens, so the next logits are wrong by as much as they are large. LFM2, whose
# layers have convolutions only, is exact. `cache.is_croppable` tells them apart, but `crop` does not ask it.
# A tiny random model hides this: its states forget within a token or two. `A_log`, the log of the rate of forgetting, is
# set to -4 here, which is slow, as trained layers can be.
#
# Seen with: transformers 5.17.0 and 5.24.0, torch 2.13.0 on the CPU, Python 3.11, on Linux, 2026-11-28.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/crop.py" <<'PY'
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, Lfm2Config, Qwen3_5TextConfig, Qwen3NextConfig

transformers.logging.set_verbosity_error()
shape = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, initializer_range=0.2)
shape |= dict(num_attention_heads=2, num_key_value_heads=1)
rule = dict(head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16)
rule |= dict(linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"])
configs = [
    Qwen3NextConfig(**shape, **rule, num_experts=0, mlp_only_layers=[0, 1]),
    Qwen3_5TextConfig(**shape, **rule),
    Lfm2Config(**shape, layer_types=["conv", "full_attention"]),
]


@torch.no_grad()
def last_logits(model, ids, cache):
    return model(ids, past_key_values=cache).logits[:, -1]


print(f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}")
for config in configs:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("A_log"):
            weight.data.fill_(-4.0)
    kept, removed, following = torch.randint(64, (1, 17)).split([10, 6, 1], dim=1)

    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    last_logits(model, torch.cat([kept, removed], dim=1), cache)
    cache.crop(-6)
    length, croppable = cache.get_seq_length(), cache.is_croppable
    cropped = last_logits(model, following, cache)

    cache = DynamicCache(config=model.config)
    last_logits(model, kept, cache)
    stepped = last_logits(model, following, cache)
    fresh = last_logits(model, torch.cat([kept, following], dim=1), None)

    def verdict(logits, fresh=fresh):
        off = (logits - fresh).abs().max().item()
        print(f"off by {off:.1e}, the largest logit is {fresh.abs().max():.1f}", file=sys.stderr)
        return "exact" if off < 1e-4 else "wrong" if off > 1 else "unclear"

    seen = f"by a cache of 10: {verdict(stepped)}; of 16 cropped to {length}: {verdict(cropped)}"
    print(f"{config.model_type}: {seen}; is_croppable {croppable}")
PY

"${PYTHON:-python3}" -m venv "$folder/env"
export PYTHONWARNINGS=ignore
for release in 5.17.0 5.24.0; do
    "$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 "transformers==$release"
    "$folder/env/bin/python" "$folder/crop.py"
done | tee "$folder/seen"

for release in 5.17.0 5.24.0; do
    cat <<TEXT
transformers $release, torch 2.13.0
qwen3_next: by a cache of 10: exact; of 16 cropped to 10: wrong; is_croppable False
qwen3_5_text: by a cache of 10: exact; of 16 cropped to 10: wrong; is_croppable False
lfm2: by a cache of 10: exact; of 16 cropped to 10: exact; is_croppable True
TEXT
done > "$folder/stated"

if ! diff "$folder/stated" "$folder/seen"; then
    echo "The finding no longer holds as stated: < was stated, > was seen." >&2
    exit 1
fi
echo "The finding holds."
