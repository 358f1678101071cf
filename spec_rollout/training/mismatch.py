"""How far the sampler's log-probs lie from the trainer's, under the names that TRL uses beside vLLM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Trainer

MEAN = "sampling/sampling_logp_difference/mean"
MAX = "sampling/sampling_logp_difference/max"


def log_difference(
    trainer: Trainer, sampled: Tensor | Sequence[Sequence[float]], recomputed: Tensor, mask: Tensor
) -> None:
    """Append mean and maximum of |recomputed - sampled| over the tokens and the ranks; every rank takes part.

    Both are of one pass over the weights that drew the tokens. What is left between them is rounding (bfloat16), and
    what the sampler's distribution has that the trainer's lacks: top-k, top-p, min-p and the repetition penalty.

    Args:
        sampled: log-probs [B, T] that the sampler reported, or a ragged list of them.
        recomputed: log-probs [B, T] of the same tokens from the trainer's pass.
        mask: [B, T], 0 where there is no token of the policy's.
    """
    if not isinstance(sampled, Tensor):
        sampled = _padded(sampled, recomputed)
    difference = (recomputed.detach().float() - sampled).abs()[mask.bool()]
    sums = torch.stack([difference.sum(), difference.new_tensor(difference.numel())])
    total, count = trainer.accelerator.reduce(sums, reduction="sum").tolist()
    largest = difference.max() if difference.numel() else difference.new_tensor(0.0)
    logged = trainer._metrics["train" if trainer.model.training else "eval"]
    logged[MEAN].append(total / max(1.0, count))
    logged[MAX].append(trainer.accelerator.gather(largest).max().item())


def _padded(rows: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    padded = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = torch.tensor(values)
    return padded
