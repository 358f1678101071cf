#!/usr/bin/env bash
# One would expect: where pip finds a set of versions and `pip check` has nothing to say, the packages import.
#
# What happens: pyarrow 26.0.1 needs NumPy 2 and declares no dependency on NumPy at all. TRL 1.16.0 and the packages that
# it brings are content with 1.26, so beside `numpy==1.26.0` pip installs them all
# without a word. Then `import datasets`, and with it TRL's trainers, end in an ImportError from inside pyarrow. With
# NumPy 2 they import.
#
# Seen with: trl 1.16.0, datasets 5.2.0, pyarrow 26.0.1, numpy 1.26.0 and 2.2.6, Python 3.11, on Linux, 2026-11-28.
# It needs Python 3.11 or 3.12: numpy 1.26.0 has no wheels for later ones.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/ask.py" <<'PY'
import importlib
from importlib.metadata import requires, version

print(", ".join(f"{name} {version(name)}" for name in ("trl", "datasets", "pyarrow", "numpy")))
for name in ("pyarrow", "datasets"):
    print(f"{name} declares of numpy: {[line for line in requires(name) or [] if line.startswith('numpy')]}")
for module in ("datasets", "trl.trainer.grpo_trainer"):
    try:
        importlib.import_module(module)
        print(f"import {module}: imports")
    except Exception as error:
        print(f"import {module}: {type(error).__name__}: {str(error).strip().splitlines()[-1]}")
PY

"${PYTHON:-python3}" -m venv "$folder/env"
python="$folder/env/bin/python"
for numpy in 1.26.0 2.2.6; do
    "$python" -m pip install --quiet --disable-pip-version-check "numpy==$numpy" \
        trl==1.16.0 datasets==5.2.0 pyarrow==26.0.1 transformers==5.24.0 accelerate==1.15.0 torch==2.13.0
    "$python" -m pip check
    "$python" "$folder/ask.py"
done | tee "$folder/seen"

cat > "$folder/stated" <<'TEXT'
No broken requirements found.
trl 1.16.0, datasets 5.2.0, pyarrow 26.0.1, numpy 1.26.0
pyarrow declares of numpy: []
datasets declares of numpy: ['numpy>=1.17']
import datasets: ImportError: pyarrow requires NumPy 2.0 or newer, found 1.26.0
import trl.trainer.grpo_trainer: ImportError: pyarrow requires NumPy 2.0 or newer, found 1.26.0
No broken requirements found.
trl 1.16.0, datasets 5.2.0, pyarrow 26.0.1, numpy 2.2.6
pyarrow declares of numpy: []
datasets declares of numpy: ['numpy>=1.17']
import datasets: imports
import trl.trainer.grpo_trainer: imports
TEXT

if ! diff "$folder/stated" "$folder/seen"; then
    echo "The finding no longer holds as stated: < was stated, > was seen." >&2
    exit 1
fi
echo "The finding holds."
