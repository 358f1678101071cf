#!/usr/bin/env bash
# One would expect: `generate` of a prompt-tuned model continues as the model's own forward says, since its virtual tokens
# lie once, in front of the prompt.
#
# What happens with transformers 5.24.0: from the second new token on it does not. `generate` calls the cache `cache`, the
# name that replaces `past_key_values`; PEFT 0.21.2 looks for the old name, finds no cache, and embeds the virtual tokens
# before every new token again. The cache grows by 6 positions at a step where one was due. No error is raised, and the
# completion has the asked length. With `use_cache=False`, and with transformers 5.17.0, it is right.
#
# Seen with: peft 0.21.2, transformers 5.17.0 and 5.24.0, torch 2.13.0 on the CPU, Python 3.11, on Linux, 2026-11-28.
# The weights are random, the virtual tokens normal with standard deviation 0.7, the batch has a padded row and a full one.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/generate.py" <<'PY'
import sys

import peft
import torch
import transformers

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
tuning = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
model = peft.get_peft_model(transformers.LlamaForCausalLM(config), tuning).eval()
torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight, std=0.7)
steps = []
model.get_base_model().model.layers[0].register_forward_pre_hook(lambda _, args: steps.append(args[0].shape[1]))
prompts = torch.randint(1, 64, (2, 9))
prompts[0, :6] = 0
mask = (prompts != 0).long()


@torch.no_grad()
def worst_by_row(use_cache):
    """The largest difference in log-prob between what generate saw and what a forward over its completion says."""
    kwargs = dict(do_sample=False, max_new_tokens=8, return_dict_in_generate=True, output_logits=True)
    out = model.generate(input_ids=prompts, attention_mask=mask, use_cache=use_cache, **kwargs)
    generated = torch.stack(out.logits, dim=1).log_softmax(-1)
    full = torch.cat([mask, mask.new_ones(2, 8)], dim=1)
    own = model(input_ids=out.sequences, attention_mask=full).logits[:, -9:-1].log_softmax(-1)
    return (generated - own).abs().amax(dim=(1, 2)).tolist()


print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}")
for use_cache in (True, False):
    steps.clear()
    worst = worst_by_row(use_cache)
    lengths = steps[:3]
    print("largest differences:", worst, file=sys.stderr)
    rows = ["agrees" if off < 1e-4 else "disagrees" if off > 1 else "unclear" for off in worst]
    print(f"use_cache={use_cache}: padded row {rows[0]}, full row {rows[1]}; positions computed at a step: {lengths}")
PY

"${PYTHON:-python3}" -m venv "$folder/env"
export PYTHONWARNINGS=ignore
for release in 5.17.0 5.24.0; do
    "$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check \
        torch==2.13.0 peft==0.21.2 "transformers==$release"
    "$folder/env/bin/python" "$folder/generate.py"
done | tee "$folder/seen"

cat > "$folder/stated" <<'TEXT'
peft 0.21.2, transformers 5.17.0, torch 2.13.0
use_cache=True: padded row agrees, full row agrees; positions computed at a step: [14, 1, 1]
use_cache=False: padded row agrees, full row agrees; positions computed at a step: [14, 15, 16]
peft 0.21.2, transformers 5.24.0, torch 2.13.0
use_cache=True: padded row disagrees, full row disagrees; positions computed at a step: [14, 6, 6]
use_cache=False: padded row agrees, full row agrees; positions computed at a step: [14, 15, 16]
TEXT

if ! diff "$folder/stated" "$folder/seen"; then
    echo "The finding no longer holds as stated: < was stated, > was seen." >&2
    exit 1
fi
echo "The finding holds."
