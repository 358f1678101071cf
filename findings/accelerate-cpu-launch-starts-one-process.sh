#!/usr/bin/env bash
# One would expect: on a machine without a GPU, `accelerate launch --cpu --num_processes 2 script.py`, and a configuration
# file of distributed_type MULTI_CPU with num_processes: 2, start two processes, and --multi_gpu none, for want of GPUs.
#
# What happens: the first two start one process and say nothing of the other. The script sees no WORLD_SIZE, so it trains as
# one process, without an error. --multi_gpu starts two processes, which run on the CPU.
#
# Seen with: accelerate 1.10.1 and 1.15.0, torch 2.13.0 on the CPU, Python 3.11, on Linux, 2026-11-28.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/who.py" <<'PY'
import os

line = f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}\n"
os.write(1, line.encode())  # in one piece: two processes write
PY

cat > "$folder/multi_cpu.yaml" <<'YAML'
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: true
YAML

launch() {
    echo "accelerate launch $*"
    OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= "$folder/env/bin/accelerate" launch "$@" who.py 2> "$folder/log" | sort
}

"${PYTHON:-python3}" -m venv "$folder/env"
cd "$folder"
for release in 1.10.1 1.15.0; do
    "$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 "accelerate==$release"
    echo "accelerate $release"
    launch --cpu --num_processes 2
    launch --config_file multi_cpu.yaml
    launch --multi_gpu --num_processes 2
done | tee "$folder/seen"

for release in 1.10.1 1.15.0; do
    cat <<TEXT
accelerate $release
accelerate launch --cpu --num_processes 2
process None of None
accelerate launch --config_file multi_cpu.yaml
process None of None
accelerate launch --multi_gpu --num_processes 2
process 0 of 2
process 1 of 2
TEXT
done > "$folder/stated"

if ! diff "$folder/stated" "$folder/seen"; then
    echo "The finding no longer holds as stated: < was stated, > was seen." >&2
    exit 1
fi
echo "The finding holds."
