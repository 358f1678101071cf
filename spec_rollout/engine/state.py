"""What the keys and values of a token depend on, besides the tokens before it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def state_of(model: nn.Module) -> tuple:
    """Another one after each change of the weights of `model`, of their dtype or place, or of the adapters that take
    part; one that writes past autograd's count (`weight.data.add_`) shows in none."""
    weights = tuple((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in _weights(model))
    device = model.get_input_embeddings().weight.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return weights, tuple(_adapters(model)), autocast


def _weights(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    for module in model.modules():  # buffers that are not saved follow from the configuration
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield buffer


def _adapters(model: nn.Module) -> Iterator[tuple]:
    """Of each layer of PEFT's: which adapters are active, switched off or merged, and by how much they count."""
    for module in model.modules():
        if "_active_adapter" in module.__dict__:
            merged, scaling = getattr(module, "merged_adapters", []), getattr(module, "scaling", {})
            names = module._active_adapter
            active = (names,) if isinstance(names, str) else tuple(names)
            yield active, module._disable_adapters, tuple(merged), tuple(scaling.items())
