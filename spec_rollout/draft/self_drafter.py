"""The policy guesses for itself: with a copy in 8 bit, on the policy's own keys and values."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from spec_rollout.draft.collecting import Collecting
from spec_rollout.draft.collector import Collector
from spec_rollout.draft.quantized import quantized_copy, refuse_unquantizable, renew
from spec_rollout.engine.attention_choice import attend
from spec_rollout.engine.gumbel_max import draw_among
from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.engine.lean.lean_pass import LeanPass
from spec_rollout.engine.lean.recognition import family_of
from spec_rollout.engine.rejection import Proposal
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.target import Target


class QuantizedTarget(Target):
    """The copy as a rollout of `policy` runs it: with what `policy` was just proven to decode with. Nothing of it is
    proven again, since its rounding depends on the rows of a pass, and its guesses are verified."""

    def __init__(self, policy: Target):
        super().__init__(quantized_copy(policy.model))
        self.policy = policy

    def prepare(self) -> None:
        """To be called within a rollout of the policy."""
        pairs = zip(self.model.modules(), self.policy.model.modules(), strict=True)
        configs = {id(own.config): (own.config, its.config) for own, its in pairs if hasattr(own, "_supports_sdpa")}
        attend([own for own, _ in configs.values()], [its._attn_implementation for _, its in configs.values()])
        self._rounds_products, self._reach = False, self.policy._reach
        family = None if torch.is_autocast_enabled(self.device.type) else family_of(self.model)
        self._lean = None if family is None else LeanPass(self.model, family)


class SelfDrafter(Collecting):
    """Guesses with `policy`'s matrices in 8 bit, while the head's `collector` goes on gathering features.

    It reads the policy's cache and writes the guesses' keys and values there, beyond the committed ones, where the
    pass that verifies them writes next. So there is no prompt to read, nothing to catch up with, and no memory but the
    weights'.

    Raises:
        ValueError: the policy cannot be put in 8 bit, or keeps more for a row than keys and values.
    """

    def __init__(self, policy: Target, collector: Collector | None = None):
        refuse_unquantizable(policy.model)
        if type(policy) is not Target or policy.recurrent:
            kind = "recurrent layers" if policy.recurrent else "virtual tokens"
            raise ValueError(
                f"draft_quantized=True needs a policy that keeps keys and values alone, and this one has {kind}: "
                "leave it at False."
            )
        super().__init__(collector)
        self.policy = policy
        self.policy_cache: SlotCache | None = None
        """The policy's, in the rollout that is running; the engine sets it."""
        self.stale = True
        """Whether the policy may have changed since its weights were read."""
        self.renew_s = 0.0
        """Seconds that reading them took last."""
        self.shape = {"quantized": "int8"}
        self._target: QuantizedTarget | None = None
        self._scores: list[Tensor] = []

    def renew(self) -> None:
        """Read the policy's weights if they may have changed."""
        if not self.stale:
            return
        began = time.perf_counter()
        if self._target is None:
            self._target = QuantizedTarget(self.policy)
        renew(self._target.model)
        self.stale, self.renew_s = False, time.perf_counter() - began

    def begin(self, rows: Rows) -> None:
        self.renew()
        self._target.prepare()
        super().begin(rows)

    def end(self) -> None:
        super().end()
        self._scores = []
        if self._target is not None:
            self._target._lean = None

    def propose(self, rows: Rows, gamma: int, noise: Tensor | None, temperature: float) -> Tensor:
        """
        Raises:
            FloatingPointError: a score is NaN or infinite; what the passes wrote is cleared.
        """
        try:
            guesses = self._guess(rows, gamma, noise, temperature)
            if not torch.stack([scores.sum() for scores in self._scores]).isfinite().all():
                raise FloatingPointError("the policy in 8 bit gives scores that are not finite")
        except (ArithmeticError, RuntimeError):  # torch's products in 8 bit refuse NaN with the latter
            self.policy_cache.clear_beyond(rows.length[: rows.count])
            raise
        return torch.cat(guesses, 1)

    def _guess(self, rows: Rows, gamma: int, noise: Tensor | None, temperature: float) -> list[Tensor]:
        count, longest = rows.count, int(rows.lengths[: rows.count].max())
        guesses, self._scores = [rows.newest()], []
        for i in range(gamma):
            place, extent = rows.length[:count, None] + i, self.policy_cache.extent(longest + i + 1)
            logits, _ = self._target.forward(self.policy_cache, (0, count), guesses[-1], place, extent)
            self._scores.append(logits[:, -1].float() / temperature)
            lane = None if noise is None else noise[:, i]
            guesses.append(draw_among(self._scores[-1], lane, None, rows.vocab_size)[:, None])
        return guesses[1:]

    def proposal(self) -> Proposal:
        return Proposal(torch.stack(self._scores, 1), None)
