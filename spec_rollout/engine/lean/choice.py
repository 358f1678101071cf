"""Whether a policy's decode passes are lean ones."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from spec_rollout.engine.lean.agreement import Forward, disagreement
from spec_rollout.engine.lean.lean_pass import LeanPass
from spec_rollout.engine.lean.recognition import family_of
from spec_rollout.engine.probe import narrow_windows


class LeanChoice:
    """Makes the lean pass of each rollout, where it was shown to compute what the policy's own forward computes."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._proven: dict[tuple, bool] = {}
        """By what the outcome depends on: the family and how the policy computes."""

    def make(self, own: Forward, vocab_size: int, kind: tuple[torch.dtype, torch.device]) -> LeanPass | None:
        """The lean pass on the weights of now; None where the policy's `own` pass has to run. `kind` is the dtype and
        device of keys and values."""
        if torch.is_autocast_enabled(kind[1].type):
            return None
        family = family_of(self.model)
        if family is None:
            return None
        key = (family, *kind)
        if key not in self._proven:
            with narrow_windows(self.model):
                off = self._disagreement(own, LeanPass(self.model, family), vocab_size, kind)
            if math.isnan(off):  # the policy's fault, and perhaps not for good
                return None
            self._proven[key] = off <= 1
            if off > 1:
                warnings.warn(
                    f"The lean decode pass differs from {type(self.model).__name__}'s own forward by {off:.3g} times "
                    "what is allowed; this policy is decoded through its own forward, which is slower.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return LeanPass(self.model, family) if self._proven[key] else None

    def _disagreement(
        self, own: Forward, lean: LeanPass, vocab_size: int, kind: tuple[torch.dtype, torch.device]
    ) -> float:
        def lean_forward(cache, slots, ids, positions, extent):
            return lean(cache, ids, positions, extent)

        def whole(ids: Tensor) -> Tensor:
            return self.model(input_ids=ids, use_cache=False).logits

        return disagreement(own, whole, lean_forward, vocab_size, kind)
