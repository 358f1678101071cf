"""Verification: how much of a guess came true, and where a row ends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """Per active row, each [B] int64: guesses that came true, tokens to emit, whether it ends with one of `eos`, and
    whether it has reached its limit."""

    accepted: Tensor
    emitted: Tensor
    ended: Tensor
    full: Tensor


def verify(guesses: Tensor, samples: Tensor, remaining: Tensor, stops: Tensor) -> Verdict:
    """Compare `guesses` [B, γ] with the target's own `samples` [B, γ + 1].

    A row emits its samples up to and including the first that differs from the guess; it is cut after the first
    sample flagged in `stops` [B, γ + 1] bool and at its `remaining` [B] tokens. Guesses beyond the cut count as not
    accepted.
    """
    matches = (samples[:, :-1] == guesses).long().cumprod(1).sum(1)
    width = samples.shape[1]
    place = torch.arange(1, width + 1, device=samples.device)
    first_stop = torch.where(stops, place, width + 1).amin(1)
    emitted = torch.minimum(torch.minimum(matches + 1, first_stop), remaining)
    return Verdict(
        torch.minimum(matches, emitted), emitted, (emitted == first_stop).long(), (emitted == remaining).long()
    )
