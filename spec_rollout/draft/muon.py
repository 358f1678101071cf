"""Muon for single matrices and for stacks of them, on devices that multiply bfloat16 and on those that do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with lr adjustment `match_rms_adamw`, which also takes stacks of matrices [E, M, N], each
    orthogonalised by itself, and serves where bfloat16 is emulated.

    torch orthogonalises in bfloat16 on any device, one matrix after the other. A CPU without such instructions takes
    many times as long for that as in float32; there, and only there, the same iteration runs in float32. State and
    options are torch's.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0):
        given = list(params)
        matrices, stacks = [p for p in given if p.ndim == 2], [p for p in given if p.ndim != 2]
        super().__init__(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.param_groups[0]["params"] += stacks  # which torch's own would refuse
        self.emulated = not multiplies_bfloat16(matrices[0].device.type)
        self.plain = not stacks

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        if self.plain and not self.emulated:
            return super().step(closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params, grads, momenta = [], [], []
            self._init_group(group, params, grads, momenta)
            for weight, grad, mean in zip(params, grads, momenta, strict=True):
                mean.lerp_(grad, 1 - group["momentum"])
                update = grad.lerp(mean, group["momentum"])
                update = update if self.emulated else update.bfloat16()
                update = orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-0.2 * max(weight.shape[-2:]) ** 0.5 * group["lr"])
        return loss


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """`matrix` [M, N], or each of a stack [E, M, N], with its singular values moved near 1, by `steps` of the quintic
    Newton-Schulz iteration with `coefficients` (Jordan et al., Muon, 2024)."""
    a, b, c = coefficients
    tall = matrix.shape[-2] > matrix.shape[-1]
    add = torch.addmm if matrix.ndim == 2 else torch.baddbmm
    x = matrix.mT if tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def multiplies_bfloat16(device: str) -> bool:
    """Whether a `device` of that type has instructions for bfloat16, so that its matrix products are faster than in
    float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
