"""Root-mean-square norms in few operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[Tensor], Tensor]


def read_norm(module: nn.Module, offset: float = 0.0) -> Norm:
    """x / √(mean(x²) + ε) · (offset + weight) over the last dimension, as `module` computes it with the weight that it
    has now.

    On a CPU torch's own `rms_norm` falls apart into six passes over x in float32; here it is ‖x‖, √(‖x‖² + n ε), a
    division and a product with the weight times √n.
    """
    eps = getattr(module, "variance_epsilon", None)
    eps = module.eps if eps is None else eps
    weight = module.weight.detach()
    size = weight.shape[-1]
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        scale = weight if offset == 0 else (weight.float() + offset).to(weight.dtype)
        return lambda x: F.rms_norm(x, (size,), scale, eps)
    scale = (weight + offset) * size**0.5
    floor = torch.tensor((eps * size) ** 0.5)

    def norm(x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.div(x, length.hypot_(floor)).mul_(scale)

    return norm
