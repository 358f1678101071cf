#!/usr/bin/env bash
# One would expect: on a device that is written in Python (torch.utils.backend_registration, a fallback for PrivateUse1, and
# a wrapper tensor with __torch_dispatch__), torch.tensor([1, 2], device=...) makes a tensor as torch.zeros(2, device=...)
# and torch.ones(2).to(...) do, and a tensor there can be indexed with a list.
#
# What happens: whatever reads a list of Python numbers (torch.tensor, torch.as_tensor, tensor.new_tensor, an index that is a
# list) fails with an internal assert that asks to report a bug, though the same numbers made on the CPU can be moved there.
#
# Seen with: torch 2.13.0 on the CPU, Python 3.11, on Linux, 2026-11-28.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/device.py" <<'PY'
import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("elsewhere")
THERE = torch.device("elsewhere", 0)


class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls, raw):
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), dtype=raw.dtype, device=THERE
        )
        made.raw = raw
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, *args, **(kwargs or {}))


def raw(value):
    return value.raw if isinstance(value, Wrapper) else value


def run(function, *args, **kwargs):
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    found = function(*map(raw, args), **{name: raw(value) for name, value in kwargs.items()})
    return Wrapper(found) if isinstance(found, torch.Tensor) else found


library = torch.library.Library("_", "IMPL")
library.fallback(run, "PrivateUse1")


def seen(make):
    try:
        return f"{make().device.type}, {raw(make()).tolist()}"
    except RuntimeError as error:
        return f"RuntimeError, {'internal assert' if 'INTERNAL ASSERT' in str(error) else str(error)}"


print(f"torch {torch.__version__.split('+')[0]}")
three = torch.arange(3).to(THERE)
print("zeros:", seen(lambda: torch.zeros(2, device=THERE)))
print("moved there:", seen(lambda: torch.tensor([1, 2]).to(THERE)))
print("made there of a list:", seen(lambda: torch.tensor([1, 2], device=THERE)))
print("as_tensor of a list:", seen(lambda: torch.as_tensor([1, 2], device=THERE)))
print("new_tensor of a list:", seen(lambda: three.new_tensor([1, 2])))
print("indexed with a slice:", seen(lambda: three[:2]))
print("indexed with a list:", seen(lambda: three[[0, 1]]))
PY

"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/env/bin/python" "$folder/device.py" | tee "$folder/seen"

cat > "$folder/stated" <<'TEXT'
torch 2.13.0
zeros: elsewhere, [0.0, 0.0]
moved there: elsewhere, [1, 2]
made there of a list: RuntimeError, internal assert
as_tensor of a list: RuntimeError, internal assert
new_tensor of a list: RuntimeError, internal assert
indexed with a slice: elsewhere, [0, 1]
indexed with a list: RuntimeError, internal assert
TEXT

if ! diff "$folder/stated" "$folder/seen"; then
    echo "The finding no longer holds as stated: < was stated, > was seen." >&2
    exit 1
fi
echo "The finding holds."
