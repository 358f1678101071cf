"""Matrix products on live weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Projection:
    """y = x Wᵀ + b for x [N, in], of a linear layer as it is now.

    A plain one is read through a view of its weight that is made once; any other module, such as an adapter's, is
    called as it is.
    """

    def __init__(self, module: nn.Module):
        plain = type(module) is nn.Linear
        self.module = None if plain else module
        self.weight = module.weight.detach().t() if plain else None
        self.bias = module.bias.detach() if plain and module.bias is not None else None

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """y, in the buffer `out` if given."""
        if self.module is not None:
            y = self.module(x)
            return y if out is None else out.copy_(y)
        if self.bias is None:
            return torch.mm(x, self.weight, out=out)
        return torch.addmm(self.bias, x, self.weight, out=out)

    def onto(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual` + y, in one operation where there is no bias and y need not be rounded by itself."""
        if self.module is None and self.bias is None and residual.dtype == torch.float32:
            return torch.addmm(residual, x, self.weight)
        return residual + self(x)


class GatedMLP:
    """down(act(gate(x)) · up(x)), in either of the forms in which checkpoints store gate and up."""

    def __init__(self, module: nn.Module, act: Callable[[Tensor], Tensor]):
        self.act = act
        self.down = Projection(module.down_proj)
        self.both = Projection(module.gate_up_proj) if hasattr(module, "gate_up_proj") else None
        if self.both is None:
            self.gate, self.up = Projection(module.gate_proj), Projection(module.up_proj)

    def inner(self, x: Tensor) -> Tensor:
        """What `down` reads."""
        gate, up = (self.gate(x), self.up(x)) if self.both is None else self.both(x).chunk(2, -1)
        return self.act(gate) * up
