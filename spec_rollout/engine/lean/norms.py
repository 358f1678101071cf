"""Root-mean-square norms in few operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Norm = Callable[..., Tensor]
"""norm(x, out=None): x / √(mean(x²) + ε) · weight over the last dimension; in the buffer `out`, if given, which may be
x itself."""


def read_norm(module: nn.Module, offset: float = 0.0, columns: bool = False) -> Norm:
    """As `module` computes it with the weight that it has now, to which `offset` is added; over the first dimension
    in place of the last if `columns`, which only float32 may have."""
    weight = module.weight.detach()
    if weight.dtype != torch.float32:
        return _called(module)
    return (rms_norm_of_columns if columns else rms_norm)(weight, epsilon(module), offset)


def read_head_norm(q_norm: nn.Module, k_norm: nn.Module, heads: tuple[int, int, int], offset: float) -> Norm:
    """Both norms of queries and keys [N, Hq + Hk, D], each over a head."""
    queries, keys, _ = heads
    if q_norm.weight.dtype == torch.float32:
        weight = torch.cat([q_norm.weight.detach().expand(queries, -1), k_norm.weight.detach().expand(keys, -1)])
        return rms_norm(weight, epsilon(q_norm), offset)

    def norm(x: Tensor, out: Tensor) -> Tensor:
        for module, part in ((q_norm, slice(queries)), (k_norm, slice(queries, None))):
            out[:, part] = module(x[:, part])
        return out

    return norm


def rms_norm(weight: Tensor, eps: float, offset: float = 0.0) -> Norm:
    """The norm with a float32 `weight` [..., n].

    torch's own `rms_norm` falls apart into six passes over x on a CPU; here it is ‖x‖, √(‖x‖² + n ε), a division and
    a product with the weight times √n.
    """
    size = weight.shape[-1]
    scale = (weight + offset) * size**0.5
    floor = weight.new_tensor((eps * size) ** 0.5)

    def norm(x: Tensor, out: Tensor | None = None) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.div(x, length.hypot_(floor), out=out).mul_(scale)

    return norm


def rms_norm_of_columns(weight: Tensor, eps: float, offset: float = 0.0) -> Norm:
    """The norm of x [n, N] with a float32 `weight` [n]: sums down the columns are fastest as a product with ones."""
    size = len(weight)
    scale = (weight + offset)[:, None] * size**0.5
    floor, ones = weight.new_full((1, 1), eps * size), weight.new_ones(1, size)

    def norm(x: Tensor, out: Tensor | None = None) -> Tensor:
        length = torch.addmm(floor, ones, x * x).sqrt_()
        return torch.div(x, length, out=out).mul_(scale)

    return norm


def _called(module: nn.Module) -> Norm:
    """In bfloat16 and float16 every rounding shows, so the module's own operations run."""

    def norm(x: Tensor, out: Tensor | None = None) -> Tensor:
        normed = module(x)
        return normed if out is None else out.copy_(normed)

    return norm


def epsilon(module: nn.Module) -> float:
    eps = getattr(module, "variance_epsilon", None)
    return module.eps if eps is None else eps
