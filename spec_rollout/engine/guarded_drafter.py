"""A drafter that can cost speed, never tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from spec_rollout.engine.protocols import Drafter
from spec_rollout.engine.rows import Rows
from spec_rollout.records import RolloutStats


class GuardedDrafter:
    """Calls a rollout's drafter, if there is one; when it breaks it is off for the rest of the rollout."""

    def __init__(self, drafter: Drafter | None, stats: RolloutStats):
        self.drafter, self.stats = drafter, stats

    def guard(self, call: Callable):
        """What `call(drafter)` returns; None where the drafter is off or breaks."""
        if self.drafter is None:
            return None
        try:
            return call(self.drafter)
        except Exception as error:  # whatever it is, the rollout goes on
            self.switch_off(error)
            return None

    def propose(self, rows: Rows, gamma: int, noise: Tensor | None, temperature: float) -> Tensor:
        """Guesses [B, γ] int64, perhaps fewer; [B, 0] when none are wanted or the drafter is off or breaks."""

        def call(drafter: Drafter) -> Tensor:
            guesses = drafter.propose(rows, gamma, noise, temperature)
            fits = guesses.dim() == 2 and len(guesses) == rows.count and guesses.shape[1] <= gamma
            if not fits or guesses.dtype != torch.int64:
                raise ValueError(
                    f"it guessed {guesses.dtype} {tuple(guesses.shape)} where int64 {(rows.count, gamma)} was wanted"
                )
            return guesses

        guesses = self.guard(call) if gamma else None
        return rows.tokens[: rows.count, :0] if guesses is None else guesses

    def switch_off(self, error: Exception) -> None:
        """Warn of `error` and count it; from here on the rollout decodes without guesses."""
        self.drafter = None
        self.stats.drafter_failures += 1
        warnings.warn(
            f"The drafter broke and is off for the rest of this rollout, which goes on with plain decoding "
            f"(num_speculative_tokens=0): {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
