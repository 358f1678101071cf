#!/usr/bin/env bash
# One would expect: where accelerate refuses to start because WORLD_SIZE is set and MASTER_ADDR is not, the process is as it
# was before: once WORLD_SIZE is taken away again, as in a notebook or between two tests, a run of one process starts.
#
# What happens: before it refuses it writes RANK, LOCAL_RANK, LOCAL_WORLD_SIZE and MASTER_PORT into os.environ, and leaves
# them there. LOCAL_RANK alone makes every later run in that process a distributed one, which fails for want of
# MASTER_ADDR, though nothing that the user set is left.
#
# Seen with: accelerate 1.10.1 and 1.15.0, torch 2.13.0 on the CPU, Python 3.11, on Linux, 2026-11-28.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/retry.py" <<'PY'
import os

import accelerate
import torch
from accelerate.state import AcceleratorState, PartialState

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start():
    AcceleratorState._reset_state(reset_partial_state=True)  # as transformers' TrainingArguments do
    try:
        return f"{PartialState(cpu=True).num_processes} process"
    except ValueError as error:
        return f"ValueError, MASTER_ADDR named: {'MASTER_ADDR' in str(error)}"


for name in NAMES:
    os.environ.pop(name, None)
os.environ["OMP_NUM_THREADS"] = "1"
print(f"accelerate {accelerate.__version__}, torch {torch.__version__.split('+')[0]}")
print("as it is:", start())
os.environ["WORLD_SIZE"] = "2"
print("WORLD_SIZE=2:", start())
del os.environ["WORLD_SIZE"]
print("left behind:", *(f"{name}={os.environ[name]}" for name in NAMES if name in os.environ))
print("without WORLD_SIZE again:", start())
os.environ.pop("LOCAL_RANK", None)
print("without LOCAL_RANK too:", start())
PY

"${PYTHON:-python3}" -m venv "$folder/env"
for release in 1.10.1 1.15.0; do
    "$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 "accelerate==$release"
    "$folder/env/bin/python" "$folder/retry.py"
done | tee "$folder/seen"

for release in 1.10.1 1.15.0; do
    cat <<TEXT
accelerate $release, torch 2.13.0
as it is: 1 process
WORLD_SIZE=2: ValueError, MASTER_ADDR named: True
left behind: RANK=0 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_PORT=29500
without WORLD_SIZE again: ValueError, MASTER_ADDR named: True
without LOCAL_RANK too: 1 process
TEXT
done > "$folder/stated"

if ! diff "$folder/stated" "$folder/seen"; then
    echo "The finding no longer holds as stated: < was stated, > was seen." >&2
    exit 1
fi
echo "The finding holds."
