#!/usr/bin/env bash
# One would expect: `Trainer.train(resume_from_checkpoint=...)` goes on with the weights that the checkpoint holds, or
# stops. (`from_pretrained` on the same folder does read all of them.)
#
# What happens: in models whose experts are stacked in memory (`experts.gate_up_proj`, `experts.down_proj`), such as
# Qwen3-MoE, `save_pretrained` writes each expert by itself (`experts.0.gate_proj.weight`, ...). `Trainer` reads the
# checkpoint's file and calls `load_state_dict(..., strict=False)` with the names as they are: no expert matches. All
# experts keep the values that the model had when the trainer was made, which are the base model's, and training goes on
# with the optimiser state of the trained ones. A warning lists the missing keys; the run does not end. So does
# `load_best_model_at_end`.
# For Mixtral the routers are lost as well, since they too have another name on disk.
#
# Seen with: transformers 5.17.0, torch 2.13.0 on the CPU, Python 3.11, on Linux, 2026-11-29.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/resume.py" <<'PY'
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig, Trainer, TrainingArguments

transformers.logging.set_verbosity_error()
size = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
size |= dict(num_key_value_heads=1, num_experts_per_tok=2)
configs = [Qwen3MoeConfig(**size, head_dim=8, moe_intermediate_size=8, num_experts=4), MixtralConfig(**size, num_local_experts=4)]
rows = [{"input_ids": [i, i + 1, i + 2], "labels": [i, i + 1, i + 2]} for i in range(16)]


def make(config, folder, steps):
    torch.manual_seed(0)
    options = dict(max_steps=steps, save_steps=2, learning_rate=0.1, report_to=[], use_cpu=True, disable_tqdm=True)
    args = TrainingArguments(folder, per_device_train_batch_size=4, logging_steps=100, **options)
    return Trainer(AutoModelForCausalLM.from_config(config), args, train_dataset=rows)


for config in configs:
    run = f"{sys.argv[1]}/{config.model_type}"
    base = {n: w.clone() for n, w in make(config, run, 2).model.state_dict().items()}
    make(config, run, 2).train()
    saved = AutoModelForCausalLM.from_pretrained(f"{run}/checkpoint-2").state_dict()
    resumed = make(config, run, 2)  # for one more step at most, whose learning rate is 0
    resumed.train(resume_from_checkpoint=f"{run}/checkpoint-2")
    got = resumed.model.state_dict()
    left = {n for n in got if torch.equal(got[n], base[n]) and not torch.equal(got[n], saved[n])}
    taken = {n for n in got if torch.equal(got[n], saved[n])}
    print(f"{config.model_type}: of {len(got)} weights {len(taken)} are the checkpoint's; as at the start: {sorted(left)}")
    assert left | taken == got.keys()
    assert {n for n in got if "experts" in n} <= left
    assert any("mlp.gate" in n for n in left) == (config.model_type == "mixtral")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.17.0 accelerate==1.15.0
"$folder/venv/bin/python" "$folder/resume.py" "$folder/run"
echo "Holds: a resumed Trainer leaves stacked experts as they were."
