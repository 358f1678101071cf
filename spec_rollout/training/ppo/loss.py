"""The two clipped losses of PPO (Schulman et al. 2017) and the coefficient of its KL penalty."""

from __future__ import annotations

import torch
from torch import Tensor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate (eq. 7), negated, of each token: max(−ρA, −clip(ρ, 1 − ε_low, 1 + ε_high) A).

    Returns:
        the loss and whether the clipped term was the larger one (and so the token has no gradient), of the shape of
        the arguments.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    free = -ratio * advantages
    clipped = -ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantages
    return torch.maximum(free, clipped), clipped > free


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float | None) -> tuple[Tensor, Tensor]:
    """½ max((V − R)², (V_old + clip(V − V_old, ±cliprange) − R)²) of each token; ½ (V − R)² where `cliprange` is None.

    Returns:
        the loss and whether the clipped term was the larger one, of the shape of the arguments.
    """
    free = (values - returns).square()
    if cliprange is None:
        return 0.5 * free, torch.zeros_like(free, dtype=torch.bool)
    move = values - old_values
    clipped = (old_values + move.clamp(-cliprange, cliprange) - returns).square()
    return 0.5 * torch.maximum(free, clipped), (clipped > free) & (move.abs() > cliprange)


class KLController:
    """The coefficient of the KL penalty: fixed, or led to a target KL as in Ziegler et al. 2019 (section 2.2).

    Args:
        coef: its initial value.
        target: KL per completion to keep to, in nats; None leaves the coefficient as it is.
        horizon: completions over which an error of 20 % or more changes the coefficient by about 20 %.
    """

    def __init__(self, coef: float, target: float | None = None, horizon: int = 10_000):
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, completions: int) -> None:
        """`kl` is the mean over `completions` of the log-ratio to the reference, summed over a completion's tokens."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * completions / self.horizon
