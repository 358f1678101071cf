"""What PPO logs beside GRPO's figures; `docs/ppo.md` says what each is."""

from __future__ import annotations

import torch
from torch import Tensor

from spec_rollout.training.ppo.advantages import Reduce, explained_variance, masked_moments


def rollout_metrics(
    rewards: Tensor, kl: Tensor, values: Tensor, advantages: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce
) -> dict[str, float]:
    """Figures of a generation from its tokens [B, T]: means over completions or tokens of all ranks."""
    every = torch.ones_like(mask[:, 0])
    figures = {
        "kl": masked_moments(kl.sum(dim=1), every, reduce)[0],
        "penalized_reward": masked_moments(rewards.sum(dim=1), every, reduce)[0],
        "values/mean": masked_moments(values, mask, reduce)[0],
        "returns/mean": masked_moments(returns, mask, reduce)[0],
        "advantages/std": masked_moments(advantages, mask, reduce)[1].sqrt(),
        "explained_variance": explained_variance(values, returns, mask, reduce),
    }
    return {name: figure.item() for name, figure in figures.items()}


def token_means(tokens: dict[str, Tensor], mask: Tensor, reduce: Reduce) -> dict[str, float]:
    """The mean of each of `tokens` [B, T] where the mask is 1, over all ranks; 0 where no token is."""
    sums = torch.stack([(x.detach() * mask).sum() for x in tokens.values()] + [mask.sum()])
    *totals, count = reduce(sums).tolist()
    return {name: total / max(count, 1.0) for name, total in zip(tokens, totals, strict=True)}
