"""A made-up device that computes on the CPU and, as a GPU does, refuses operands that lie on the CPU.

`pytest --device apart` runs on it, so that a tensor forgotten on the host is found on a machine without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "apart"
TAKE_BOTH = {"_to_copy", "copy_", "index", "index_put", "index_put_"}
"""Operations of a GPU that take operands of the CPU too."""
NOT_THROUGH_OUT = ("eye", "eye.m", "randperm", "randperm.generator")
"""Factories that PyTorch makes by resizing an output, which a wrapper cannot follow."""


class Backend:
    """What PyTorch asks the module of a device."""

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device) -> None:
        pass

    synchronize = manual_seed_all = set_device

    def get_rng_state(self, device=None) -> Tensor:
        return torch.default_generator.get_state()

    def set_rng_state(self, state, device=None) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
DEVICE = torch.device(NAME, 0)


class Apart(Tensor):
    """A tensor of the device; `raw` holds its numbers."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor):
        layout = dict(strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE)
        made = Tensor._make_wrapper_subclass(cls, raw.shape, **layout)
        made.raw = raw
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"apart({self.raw})"

    def tolist(self) -> list:
        return self.raw.tolist()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(torch.tensor(i) if isinstance(i, list) else i for i in index), *args[2:])
        elif function is Tensor.new_tensor:
            return torch.tensor(args[1], **{"dtype": args[0].dtype, "device": DEVICE} | (kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function, args: tuple, kwargs: dict):
    """`function` on the numbers of its operands; what it makes lies where it would with a GPU."""
    name = function.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Apart)]
    if len(here) < len(tensors) and name not in TAKE_BOTH and any(tensor.dim() for tensor in here):
        raise RuntimeError(f"{name} takes operands on {NAME} and on the CPU: {[tuple(t.shape) for t in tensors]}")
    asked = kwargs.get("device")
    if asked is not None:
        there, kwargs = asked.type == NAME, kwargs | {"device": torch.device("cpu")}
    else:
        there = isinstance(args[0], Apart) if name == "copy_" else len(here) < len(tensors)
    known = {id(tensor.raw): tensor for tensor in tensors if isinstance(tensor, Apart)}

    def lifted(found):
        if not isinstance(found, Tensor) or not there:
            return found
        return known[id(found)] if id(found) in known else Apart(found)

    given, named = tree_map(lambda x: x.raw if isinstance(x, Apart) else x, (args, kwargs))
    return tree_map(lifted, function(*given, **named))


def _fallback(function, *args, **kwargs):
    return run(function, args, kwargs)


def _onto_device(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`make` on the CPU, then moved (findings/torch-python-device-takes-no-lists.sh)."""

    def made(*args, device=None, **kwargs) -> Tensor:
        tensor = make(*args, **kwargs)
        return tensor if device is None else tensor.to(device)

    return made


_EVERY, _ATEN = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_EVERY.fallback(_fallback, "PrivateUse1")
for _name in NOT_THROUGH_OUT:
    _packet, _, _overload = _name.partition(".")
    _function = getattr(getattr(torch.ops.aten, _packet), _overload or "default")
    _ATEN.impl(_name, lambda *args, _function=_function, **kwargs: run(_function, args, kwargs), "PrivateUse1")
torch.tensor, torch.as_tensor, torch.asarray = map(_onto_device, (torch.tensor, torch.as_tensor, torch.asarray))
torch.__future__.set_swap_module_params_on_conversion(True)
