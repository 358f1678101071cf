#!/usr/bin/env bash
# One would expect: a Gemma 2 with `attn_logit_softcapping`, loaded without naming an attention implementation, computes
# what its config says, and `attn_implementation="sdpa"` either does so too or is refused.
#
# What happens with transformers 5.17.0: "sdpa" is the default, PyTorch's function has no soft cap, and the cap is dropped
# in silence. The logits are those of a config with `attn_logit_softcapping=None`. `attn_implementation="eager"` applies
# it. Transformers 5.24.0 takes "eager" by default and refuses "sdpa" with a ValueError. So the same checkpoint, loaded the
# same way, is another function in the two versions, and log-probs of the one are not those of the other.
#
# Seen with: transformers 5.17.0 and 5.24.0, torch 2.13.0 on the CPU, Python 3.11, on Linux, 2026-11-28.
# The weights are random, and wide enough for attention scores of the cap's size, 50 as in Gemma 2's own configs.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/softcap.py" <<'PY'
import sys

import torch
import transformers
from transformers import Gemma2Config, Gemma2ForCausalLM

transformers.utils.logging.disable_progress_bar()
torch.manual_seed(0)
policy = sys.argv[1]
config = Gemma2Config(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, initializer_range=0.6,
)  # fmt: skip
Gemma2ForCausalLM(config).save_pretrained(policy)
ids = torch.randint(64, (1, 12))


@torch.no_grad()
def logits(**kwargs):
    model = Gemma2ForCausalLM.from_pretrained(policy, **kwargs).eval()
    return model.config._attn_implementation, model(ids).logits


def verdict(found, wanted):
    off = (found - wanted).abs().max().item()
    print(f"off by {off:.1e}, the largest logit is {wanted.abs().max():.1f}", file=sys.stderr)
    return "same" if off < 1e-4 else "other" if off > 0.1 else "unclear"


print(f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}")
print(f"attn_logit_softcapping {config.attn_logit_softcapping}")
_, capped = logits(attn_implementation="eager")
_, uncapped = logits(attn_implementation="eager", attn_logit_softcapping=None)
default, found = logits()
print(f"by default {default}: {verdict(found, capped)} as eager, {verdict(found, uncapped)} as eager without the cap")
try:
    _, found = logits(attn_implementation="sdpa")
    print(f"sdpa by name: {verdict(found, capped)} as eager, {verdict(found, uncapped)} as eager without the cap")
except ValueError as error:
    print(f"sdpa by name: {type(error).__name__}")
PY

"${PYTHON:-python3}" -m venv "$folder/env"
for release in 5.17.0 5.24.0; do
    "$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 "transformers==$release"
    "$folder/env/bin/python" "$folder/softcap.py" "$folder/policy"
done | tee "$folder/seen"

cat > "$folder/stated" <<'TEXT'
transformers 5.17.0, torch 2.13.0
attn_logit_softcapping 50.0
by default sdpa: other as eager, same as eager without the cap
sdpa by name: other as eager, same as eager without the cap
transformers 5.24.0, torch 2.13.0
attn_logit_softcapping 50.0
by default eager: same as eager, other as eager without the cap
sdpa by name: ValueError
TEXT

if ! diff "$folder/stated" "$folder/seen"; then
    echo "The finding no longer holds as stated: < was stated, > was seen." >&2
    exit 1
fi
echo "The finding holds."
