"""Matrix products on live weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Projection:
    """y = x Wᵀ + b for x [N, in], of a linear layer as it is now.

    A plain one is read through a view of its weight that is made once; any other module, such as an adapter's, is
    called as it is. With `columns` (see `products`) all of x and y is [in, N] and [out, N].
    """

    def __init__(self, module: nn.Module, columns: bool = False):
        plain = type(module) is nn.Linear
        self.module, self.columns = None if plain else module, columns
        weight = module.weight.detach() if plain else None
        bias = module.bias.detach() if plain and module.bias is not None else None
        self.weight = weight if columns or weight is None else weight.t()
        self.bias = bias[:, None] if columns and bias is not None else bias

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """y, in the buffer `out` if given."""
        if self.module is not None:
            y = self.module(x.t()).t() if self.columns else self.module(x)
            return y if out is None else out.copy_(y)
        factors = (self.weight, x) if self.columns else (x, self.weight)
        if self.bias is None:
            return torch.mm(*factors, out=out)
        return torch.addmm(self.bias, *factors, out=out)

    def onto(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual` + y, in one operation where there is no bias and y need not be rounded by itself."""
        if self.module is None and self.bias is None and residual.dtype == torch.float32:
            return torch.addmm(residual, self.weight, x) if self.columns else torch.addmm(residual, x, self.weight)
        return residual + self(x)


class GatedMLP:
    """down(act(gate(x)) · up(x)), in either of the forms in which checkpoints store gate and up."""

    def __init__(self, module: nn.Module, act: Callable[[Tensor], Tensor], columns: bool = False):
        self.act, self.columns, self.width = act, columns, module.down_proj.in_features
        self.down = Projection(module.down_proj, columns)
        self.both = Projection(module.gate_up_proj, columns) if hasattr(module, "gate_up_proj") else None
        if self.both is None:
            self.gate, self.up = Projection(module.gate_proj, columns), Projection(module.up_proj, columns)

    def inner(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """What `down` reads, in the buffer `out` if given."""
        gate, up = (self.gate(x), self.up(x)) if self.both is None else self.both(x).chunk(2, 0 if self.columns else 1)
        return torch.mul(self.act(gate), up, out=out)
