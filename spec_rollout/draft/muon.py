"""Muon on devices that multiply bfloat16 and on those that do not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with lr adjustment `match_rms_adamw`, which also serves where bfloat16 is emulated.

    torch orthogonalises in bfloat16 on any device. A CPU without such instructions takes many times as long for that
    as in float32; there, and only there, the same iteration runs in float32. State and options are torch's.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0):
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.emulated = not multiplies_bfloat16(self.param_groups[0]["params"][0].device.type)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        if not self.emulated:
            return super().step(closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params, grads, momenta = [], [], []
            self._init_group(group, params, grads, momenta)
            for weight, grad, mean in zip(params, grads, momenta, strict=True):
                mean.lerp_(grad, 1 - group["momentum"])
                update = orthogonal(
                    grad.lerp(mean, group["momentum"]), group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-0.2 * max(weight.shape) ** 0.5 * group["lr"])
        return loss


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """`matrix` [M, N] float32 with its singular values moved near 1, by `steps` of the quintic Newton-Schulz iteration
    with `coefficients` (Jordan et al., Muon, 2024)."""
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def multiplies_bfloat16(device: str) -> bool:
    """Whether a `device` of that type has instructions for bfloat16, so that its matrix products are faster than in
    float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
