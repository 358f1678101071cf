"""Matrix products on live weights."""

from __future__ import annotations

from collections.abc import Sequence

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

    def __call__(self, x: Tensor) -> Tensor:
        if self.module is not None:
            return self.module(x)
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def onto(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual` + y, in one operation where there is no bias."""
        if self.module is None and self.bias is None:
            return torch.addmm(residual, x, self.weight)
        return residual + self(x)


class Joined:
    """The outputs of several projections of one input, side by side."""

    def __init__(self, modules: Sequence[nn.Module]):
        self.parts = [Projection(module) for module in modules]

    def __call__(self, x: Tensor) -> Tensor:
        return self.parts[0](x) if len(self.parts) == 1 else torch.cat([part(x) for part in self.parts], 1)


class GatedMLP:
    """down(act(gate(x)) · up(x)), in either of the forms in which checkpoints store gate and up."""

    def __init__(self, module: nn.Module):
        self.down = Projection(module.down_proj)
        self.both = Projection(module.gate_up_proj) if hasattr(module, "gate_up_proj") else None
        if self.both is None:
            self.gate, self.up, self.act = Projection(module.gate_proj), Projection(module.up_proj), module.act_fn
        else:
            self.act = module.activation_fn

    def inner(self, x: Tensor) -> Tensor:
        """What `down` reads."""
        gate, up = (self.gate(x), self.up(x)) if self.both is None else self.both(x).chunk(2, -1)
        return self.act(gate) * up
