#!/usr/bin/env bash
# One would expect: TrlParser takes any of TRL's configurations together with its ModelConfig, as TRL's own scripts for
# GRPO, RLOO, SFT and DPO do.
#
# What happens: AsyncGRPOConfig has a field `dtype` of its own, and so has ModelConfig. The parser of the two cannot be
# built: argparse reports conflicting options. GRPOConfig, beside it, is taken.
#
# Seen with: trl 1.16.0, transformers 5.17.0, torch 2.13.0 on the CPU, Python 3.11, on Linux, 2026-11-29.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 trl==1.16.0 transformers==5.17.0 aiohttp requests

cat > "$folder/parse.py" <<'PY'
import argparse

from trl import GRPOConfig, ModelConfig, TrlParser
from trl.experimental.async_grpo import AsyncGRPOConfig

for config in (GRPOConfig, AsyncGRPOConfig):
    try:
        TrlParser((config, ModelConfig))
    except argparse.ArgumentError as error:
        print(f"{config.__name__}: {error}")
    else:
        print(f"{config.__name__}: taken")
PY

TRL_EXPERIMENTAL_SILENCE=1 "$folder/env/bin/python" "$folder/parse.py" | tee "$folder/seen"
cat > "$folder/stated" <<'TEXT'
GRPOConfig: taken
AsyncGRPOConfig: argument --dtype: conflicting option string: --dtype
TEXT

if ! diff "$folder/stated" "$folder/seen"; then
    echo "The finding no longer holds as stated: < was stated, > was seen." >&2
    exit 1
fi
echo "The finding holds."
