#!/usr/bin/env bash
# One would expect: `Trainer.save_model` calls `Trainer._save` on the rank that saves only, as it did, so a
# trainer that overrides `_save` to write something beside the model writes it once.
#
# What happens with transformers 5.24.0: `_save` is called on every rank under plain data parallelism, and its own body
# leaves early on those that do not save. An override that calls `super()._save()` and then writes its own file now writes
# on all ranks at once, to the same path; it has to ask `args.should_save` itself. With 5.17.0 `save_model` asked.
#
# Seen with: transformers 5.17.0 and 5.24.0, accelerate 1.15.0, torch 2.13.0 on the CPU, two processes with gloo,
# Python 3.11, on Linux, 2026-11-28.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/save.py" <<'PY'
import sys
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

folder = Path(sys.argv[1])
calls = folder / "calls"
calls.mkdir(parents=True, exist_ok=True)


class Own(Trainer):
    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        (calls / str(self.args.process_index)).write_text(str(self.args.should_save))


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
args = TrainingArguments(
    output_dir=str(folder / "policy"), use_cpu=True, ddp_backend="gloo", max_steps=1, per_device_train_batch_size=1,
    save_strategy="no", report_to=[], disable_tqdm=True,
)  # fmt: skip
rows = [{"input_ids": list(range(1, 9)), "labels": list(range(1, 9))} for _ in range(4)]
trainer = Own(LlamaForCausalLM(config), args, train_dataset=rows)
trainer.train()
trainer.save_model()
torch.distributed.barrier()
if trainer.args.process_index == 0:
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    called = [f"rank {path.name} with should_save={path.read_text()}" for path in sorted(calls.iterdir())]
    files = sorted(path.name for path in (folder / "policy").glob("*.safetensors"))
    (folder / "seen").write_text(
        f"{versions}, {trainer.args.world_size} processes\n_save was called on: {', '.join(called)}\nweights: {files}\n"
    )
torch.distributed.destroy_process_group()
PY

"${PYTHON:-python3}" -m venv "$folder/env"
for release in 5.17.0 5.24.0; do
    "$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check \
        torch==2.13.0 accelerate==1.15.0 "transformers==$release"
    "$folder/env/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 \
        "$folder/save.py" "$folder/$release" > "$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 1; }
    cat "$folder/$release/seen"
done | tee "$folder/seen"

cat > "$folder/stated" <<'TEXT'
transformers 5.17.0, torch 2.13.0, 2 processes
_save was called on: rank 0 with should_save=True
weights: ['model.safetensors']
transformers 5.24.0, torch 2.13.0, 2 processes
_save was called on: rank 0 with should_save=True, rank 1 with should_save=False
weights: ['model.safetensors']
TEXT

if ! diff "$folder/stated" "$folder/seen"; then
    echo "The finding no longer holds as stated: < was stated, > was seen." >&2
    exit 1
fi
echo "The finding holds."
