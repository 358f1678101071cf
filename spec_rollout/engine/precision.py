"""What the policy's numbers can hold, and what is said of those that are none."""

from __future__ import annotations

import torch
from torch import nn


def broken_policy(model: nn.Module, where: str) -> FloatingPointError:
    """What is raised for a policy whose logits are NaN, infinite, or -inf for every token."""
    return FloatingPointError(
        f"{type(model).__name__} gave no distribution {where}: its logits are NaN or infinite. Its weights are broken "
        f"or too large for {model.dtype}: look at the loss and the gradients of the updates before. Nothing of this "
        "rollout is returned; with good weights the next one starts clean."
    )


def rounds_products(device: torch.device) -> bool:
    """Whether products of float32 are computed on `device` in fewer digits: TF32, or bfloat16 on a CPU."""
    exact = 1 + 2.0**-12  # more digits than either has
    product = torch.full((64, 64), exact, device=device) @ torch.eye(64, device=device)
    return bool((product.float() != exact).any())
