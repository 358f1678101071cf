#!/usr/bin/env bash
# One would expect: without a GPU, a configuration file of distributed_type FSDP with use_cpu: true and num_processes: 2
# either shards the model over two processes on the CPU, or is refused.
#
# What happens: nothing is sharded, and nothing is said, though ACCELERATE_USE_FSDP is "true". Under 1.10.1 two processes
# hold a whole model each, under DDP. Under 1.15.0 each of the two takes itself for the only one: two runs side by side that
# know nothing of each other, both the main process, unless the script itself says Accelerator(cpu=True); then it is DDP.
#
# Seen with: accelerate 1.10.1 and 1.15.0, torch 2.13.0 on the CPU, Python 3.11, on Linux, 2026-11-28.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/train.py" <<'PY'
import os
import sys

import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True) if "--cpu" in sys.argv else Accelerator()
model = accelerator.prepare(torch.nn.Linear(8, 8, bias=False))
line = (
    f"process {accelerator.process_index} of {accelerator.num_processes}, {type(model).__name__}, "
    f"{sum(p.numel() for p in model.parameters())} of 64 weights, FSDP asked for: {os.environ['ACCELERATE_USE_FSDP']}\n"
)
os.write(1, line.encode())  # in one piece: two processes write
if torch.distributed.is_initialized():
    torch.distributed.barrier()  # one that goes first takes the store with it
    torch.distributed.destroy_process_group()
PY

cat > "$folder/fsdp.yaml" <<'YAML'
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: true
YAML

launch() {
    local port
    port=$("$folder/env/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    echo "accelerate launch --config_file fsdp.yaml $*"
    # What is stated is what they print; how they end is not.
    OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= "$folder/env/bin/accelerate" launch --main_process_port "$port" \
        --config_file fsdp.yaml "$@" > "$folder/out" 2> "$folder/log" || true
    grep "weights" "$folder/out" | sort || cat "$folder/log" >&2
}

"${PYTHON:-python3}" -m venv "$folder/env"
cd "$folder"
for release in 1.10.1 1.15.0; do
    "$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 "accelerate==$release"
    echo "accelerate $release"
    launch train.py
    launch train.py --cpu
done | tee "$folder/seen"

cat > "$folder/stated" <<'TEXT'
accelerate 1.10.1
accelerate launch --config_file fsdp.yaml train.py
process 0 of 2, DistributedDataParallel, 64 of 64 weights, FSDP asked for: true
process 1 of 2, DistributedDataParallel, 64 of 64 weights, FSDP asked for: true
accelerate launch --config_file fsdp.yaml train.py --cpu
process 0 of 2, DistributedDataParallel, 64 of 64 weights, FSDP asked for: true
process 1 of 2, DistributedDataParallel, 64 of 64 weights, FSDP asked for: true
accelerate 1.15.0
accelerate launch --config_file fsdp.yaml train.py
process 0 of 1, Linear, 64 of 64 weights, FSDP asked for: true
process 0 of 1, Linear, 64 of 64 weights, FSDP asked for: true
accelerate launch --config_file fsdp.yaml train.py --cpu
process 0 of 2, DistributedDataParallel, 64 of 64 weights, FSDP asked for: true
process 1 of 2, DistributedDataParallel, 64 of 64 weights, FSDP asked for: true
TEXT

if ! diff "$folder/stated" "$folder/seen"; then
    echo "The finding no longer holds as stated: < was stated, > was seen." >&2
    exit 1
fi
echo "The finding holds."
