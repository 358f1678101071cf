"""Rows without a gap between virtual tokens and prompt, where TRL pads on the left."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROLLED = ("input_ids", "attention_mask", "labels")
RESTORED = ("log_probs", "entropy", "logits")


def close_gaps(policy: nn.Module) -> None:
    """Have `policy`, a PEFT model with virtual tokens, read each padded row as it would read the row alone.

    PEFT puts the virtual tokens before the padding, so that the prompt would lie at other positions behind them, the
    more padding the farther. With these hooks the padding stands on the right within the forward pass; what it returns
    is in TRL's order again.
    """
    gaps: list[Tensor | None] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        mask = kwargs.get("attention_mask")
        if mask is None or mask.dim() != 2 or kwargs.get("input_ids") is None:
            gaps.append(None)
            return None
        gaps.append((mask != 0).long().argmax(1, keepdim=True))  # [B, 1], columns before the first token
        rolled = {name: roll(kwargs[name], -gaps[-1]) for name in ROLLED if kwargs.get(name) is not None}
        return args, kwargs | rolled

    def after(module: nn.Module, args: tuple, output):
        gap = gaps.pop()
        if gap is not None and output is not None:
            for name in RESTORED:
                if output.get(name) is not None:
                    output[name] = roll(output[name], gap)
        return output

    policy.register_forward_pre_hook(before, with_kwargs=True)
    policy.register_forward_hook(after, always_call=True)


def roll(rows: Tensor, by: Tensor) -> Tensor:
    """`rows` [B, T, ...], each rolled to the right by its entry of `by` [B, 1]."""
    place = (torch.arange(rows.shape[1], device=rows.device) - by) % rows.shape[1]
    return rows[torch.arange(rows.shape[0], device=rows.device)[:, None], place]
