"""From scores and values to advantages.

Tensors are [B, T] over the tokens of B completions; `mask` is 1 at the policy's own tokens and 0 at padding and at
what tools wrote. Sums over all ranks are taken by `reduce` (a sum over ranks; by default there is one rank).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


def one_rank(sums: Tensor) -> Tensor:
    return sums


def token_rewards(scores: Tensor, kl: Tensor, kl_coef: float, mask: Tensor) -> Tensor:
    """The reward of each token: −kl_coef · kl, and at a completion's last own token its score [B] besides.

    A completion without any token of its own has no reward.
    """
    rewards = -kl_coef * kl * mask
    last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1, keepdim=True)  # [B, 1]
    return rewards.scatter_add(1, last, (scores * mask.amax(dim=1))[:, None].to(rewards.dtype))


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) over the policy's own tokens.

    δ_t = r_t + γ V_{t+1} − V_t,   A_t = δ_t + γλ A_{t+1},   R_t = A_t + V_t

    where t + 1 is the next token of the policy's own, and V and A are 0 after the last one: what a tool wrote in
    between is part of the transition, and a completion that was cut off counts as ended.

    Returns:
        advantages and returns [B, T], 0 where the mask is.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        own = mask[:, t] > 0
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        next_advantage = torch.where(own, advantage, next_advantage)
        next_value = torch.where(own, values[:, t], next_value)
        advantages[:, t] = advantage * own
    return advantages, (advantages + values) * mask


def masked_moments(x: Tensor, mask: Tensor, reduce: Reduce = one_rank) -> tuple[Tensor, Tensor]:
    """Mean and (population) variance of `x` where the mask is 1, over all ranks."""
    total, count = reduce(torch.stack([(x * mask).sum(), mask.sum()]))
    count = count.clamp(min=1)
    mean = total / count
    return mean, reduce(((x - mean).square() * mask).sum()) / count


def whiten(x: Tensor, mask: Tensor, reduce: Reduce = one_rank) -> Tensor:
    """(x − mean) / (standard deviation + 1e-8) over the valid tokens of all ranks; 0 where the mask is."""
    mean, variance = masked_moments(x, mask, reduce)
    return (x - mean) / (variance.sqrt() + 1e-8) * mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce = one_rank) -> Tensor:
    """1 − Var(R − V) / Var(R): 1 is a perfect value function, 0 one no better than a constant. NaN where all returns
    are equal."""
    _, residual = masked_moments(returns - values, mask, reduce)
    _, variance = masked_moments(returns, mask, reduce)
    return torch.where(variance > 0, 1 - residual / variance, torch.nan)
