"""A drafter that can cost speed, never tokens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spec_rollout.engine.kept_slot import KeptSlot
from spec_rollout.engine.protocols import Drafter, GoesOn
from spec_rollout.engine.rejection import Proposal
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.transfers import Slots
from spec_rollout.records import RolloutStats


class GuardedDrafter:
    """Calls a rollout's drafter, if there is one; when it breaks it is off for the rest of the rollout.

    It is shown copies: what it writes into rows or noise reaches nobody else.
    """

    def __init__(self, drafter: Drafter | None, stats: RolloutStats):
        self.drafter, self.stats = drafter, stats
        self._shown: Rows | None = None

    def slot_bytes(self, capacity: int) -> int:
        """What the drafter keeps for a slot of `capacity` tokens."""
        return 0 if self.drafter is None else self.drafter.slot_bytes(capacity)

    def end(self) -> None:
        """The rollout is over; the drafter gives back what it took."""
        if self.drafter is None:
            return
        try:
            self.drafter.end()
        except Exception as error:  # whatever it is, the rollout is complete
            self.switch_off(error)

    def call(self, verb: str, rows: Rows, *args, news: int | None = None):
        """What the drafter's `verb` returns for `rows` and `args`; None where the drafter is off or breaks. Only
        the last `news` known tokens of each row may be others than at the call before; any of them if None."""
        if self.drafter is None:
            return None
        copies = [_copied(arg) for arg in args]
        try:
            return getattr(self.drafter, verb)(self._show(rows, news), *copies)
        except Exception as error:  # whatever it is, the rollout goes on
            self.switch_off(error)
            return None

    def propose(self, rows: Rows, gamma: int, noise: Tensor | None, temperature: float) -> Tensor:
        """Guesses [B, γ] int64, perhaps fewer; [B, 0] when none are wanted or the drafter is off or breaks."""
        none = rows.tokens[: rows.count, :0]
        if not gamma or self.drafter is None:
            return none
        guesses = self.call("propose", rows, gamma, noise, temperature, news=0)
        if self.drafter is None:
            return none
        fault = _fault_of_guesses(guesses, rows, gamma)
        if fault:
            self.switch_off(ValueError(fault))
            return none
        return guesses

    def proposal(self, guesses: Tensor, invalid: Tensor, vocab_size: int) -> Proposal | None:
        """What `guesses` [B, γ] were drawn from, in float32; None if nothing that could be so is known. NaN in it and
        guesses that it does not hold are for `draw_by_rejection` to find.

        In the rows `invalid` [B] a guess that was no id has become another, which was drawn from nothing: NaN.
        """
        if self.drafter is None:
            return None
        try:
            proposal = self.drafter.proposal()
            fault = None if proposal is None else _fault_of_proposal(*proposal, guesses, vocab_size)
        except Exception as error:  # whatever it is, the rollout goes on
            self.switch_off(error)
            return None
        if fault:
            self.switch_off(ValueError(fault))
        if fault or proposal is None:
            return None
        return Proposal(proposal[0].float().masked_fill(invalid[:, None, None], torch.nan), proposal[1])

    def keep(self, rows: Rows, slots: Slots) -> list[tuple[object, KeptSlot | None]]:
        """The drafter, and what it keeps of the complete rows in `slots` [N]."""
        kept = self.call("keep", rows, slots) if isinstance(self.drafter, GoesOn) else None
        return [(self.drafter, part) for part in kept or [None] * len(slots.host)]

    def part(self, kept: tuple[object, KeptSlot | None]) -> KeptSlot | None:
        """What `keep` gave, if it is of this drafter."""
        return kept[1] if kept[0] is self.drafter else None

    def takes(self, rows: Rows, kept: tuple[object, KeptSlot | None]) -> bool:
        """Whether the drafter can go on from what `keep` gave. One that is off, or breaks, is in nobody's way."""
        if not isinstance(self.drafter, GoesOn):
            return True
        return self.call("takes", rows, self.part(kept), news=0) is not False

    def enter(self, rows: Rows, slots: tuple[int, int], taken: np.ndarray, kept: Sequence[KeptSlot | None]) -> None:
        """Rows begin in slots[0]..slots[1] - 1, behind the `taken` [N] first tokens of each; see `GoesOn`."""
        if isinstance(self.drafter, GoesOn):
            self.call("enter", rows, slots, taken.copy(), kept)

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

    def _show(self, rows: Rows, news: int | None) -> Rows:
        if self._shown is None:
            self._shown = Rows(rows.slots, rows.capacity, rows.vocab_size, rows.device)
        return rows.show(self._shown, news)


def _copied(arg: object) -> object:
    """`arg`, or a copy of it; hidden states nobody reads again."""
    if isinstance(arg, Slots):
        return Slots(arg.host.copy(), arg.device.clone())
    return arg.clone() if isinstance(arg, Tensor) else arg


def _fault_of_guesses(guesses: object, rows: Rows, gamma: int) -> str | None:
    wanted = f"int64 {(rows.count, gamma)} on {rows.device} was wanted"
    if not isinstance(guesses, Tensor):
        return f"it guessed {type(guesses).__name__} where {wanted}"
    fits = guesses.dim() == 2 and len(guesses) == rows.count and guesses.shape[1] <= gamma
    if fits and guesses.dtype == torch.int64 and guesses.device == rows.tokens.device:
        return None
    return f"it guessed {guesses.dtype} {tuple(guesses.shape)} on {guesses.device} where {wanted}"


def _fault_of_proposal(scores: object, ids: object, guesses: Tensor, vocab_size: int) -> str | None:
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.device != guesses.device:
        kind = f"{scores.dtype} on {scores.device}" if isinstance(scores, Tensor) else type(scores).__name__
        return f"its proposal has scores of {kind} where floating-point numbers on {guesses.device} were wanted"
    width = vocab_size
    if ids is not None:
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 1 or ids.device != guesses.device:
            return f"the ids of its proposal are not a row of int64 on {guesses.device}"
        width = len(ids)
    if scores.shape != (*guesses.shape, width) or not width:
        return f"its proposal has scores {tuple(scores.shape)} where {(*guesses.shape, width)} was wanted"
    return None
