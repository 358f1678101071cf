"""Who takes part in a rollout: who guesses, and who looks on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from spec_rollout.engine.kept_slot import KeptSlot
from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.engine.rejection import Proposal
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.transfers import Slots
from spec_rollout.records import Completion, Request, RolloutStats


class Drafter(Protocol):
    """Guesses the next tokens of each active row. Its guesses can cost speed, never correctness."""

    ready: bool
    """False until it has learned to guess: it is then not asked, but when its time is measured."""

    def slot_bytes(self, capacity: int) -> int:
        """What it keeps for a slot of `capacity` tokens in the rollout that has begun."""

    def begin(self, rows: Rows) -> None:
        """A rollout starts on `rows`, at most `rows.slots` at a time, which have no room yet."""

    def end(self) -> None:
        """It is over, or was given up: what was taken for it is to be given back. Also where it did not begin."""

    def resize(self, rows: Rows, kept: int) -> None:
        """The slots are now as many and as long as `rows.tokens`. The first `kept` keep what they hold: those of
        active rows, and of rows that are still being read."""

    def propose(self, rows: Rows, gamma: int, noise: Tensor | None, temperature: float) -> Tensor:
        """Guesses [B, gamma] int64 for the B = rows.count active rows.

        `noise` [B, gamma + 1, N] is the Gumbel noise of the positions to be guessed (None when greedy); a drafter that
        draws from its own scores with it, as the target will (`gumbel_max.draw`), makes the guesses that the target is
        most likely to draw. `temperature` is the rollout's (1 when greedy).
        """

    def proposal(self) -> Proposal | None:
        """What the last guesses were drawn from by the noise, for `verification="rejection"`; None if there was no
        distribution, such as in a table of n-grams."""

    def read(self, rows: Rows, slots: tuple[int, int], start: np.ndarray, hidden: Sequence[Tensor]) -> None:
        """The target has read a piece of what is known of the new rows in slots[0]..slots[1]-1: `hidden` (its hidden
        states, each [N, T, H]) are those at positions start[n] + 0..T-1; from a row's length on they are padding. The
        pieces of a row follow each other."""

    def admit(self, rows: Rows, slots: tuple[int, int]) -> None:
        """The new rows in slots[0]..slots[1]-1 have been read, all but the last known token, and are active now."""

    def observe(self, rows: Rows, slots: tuple[int, int], start: Tensor, hidden: Sequence[Tensor]) -> None:
        """A step has computed `hidden`, each [N, T, H], at positions start[n] + 0..T-1 of the active rows in the slots
        slots[0]..slots[1]-1, where each had ended; positions at or beyond its length are guesses not come true."""

    def copy(self, rows: Rows, source: Slots, target: Slots) -> None:
        """Slots `target` [N] become copies of slots `source` [N] (siblings of a group; a row moved to a free slot)."""

    def finish(self, rows: Rows, slots: Slots) -> None:
        """The rows in `slots` [N] are complete and about to leave."""


@runtime_checkable
class ReadsCache(Protocol):
    """A drafter that guesses on the policy's own keys and values. It may write into the policy's cache where the pass
    that verifies its guesses writes next, and must leave nothing there that is not finite."""

    policy_cache: SlotCache | None
    """Set before a rollout begins."""


@runtime_checkable
class GoesOn(Protocol):
    """A drafter that keeps what it made of a row's tokens, for rows that begin with them. Of such tokens nothing is
    observed. One without these verbs reads what it needs in `rows.tokens`."""

    def keep(self, rows: Rows, slots: Slots) -> list[KeptSlot | None]:
        """Copies of what the slots `slots` [N] hold of their committed tokens; None where that is not all there is to
        keep. The rows are complete, and not closed up yet."""

    def takes(self, rows: Rows, kept: KeptSlot | None) -> bool:
        """Whether it can go on behind the tokens of which it kept that; None is what it keeps of another drafter's."""

    def enter(self, rows: Rows, slots: tuple[int, int], taken: np.ndarray, kept: list[KeptSlot | None]) -> None:
        """Rows begin in slots[0]..slots[1]-1. Of each the first `taken` [N] tokens are not observed: what `kept` has
        of them is to be put there; where it is None, `copy` has done so."""


class Recorder(Protocol):
    """Looks on while completions are sampled; `source` tells it who guesses, the "head", "ngrams" or a "model"."""

    source: str

    def step(self, rows: Rows, emitted: np.ndarray, gamma: int) -> None:
        """The active rows have just emitted `emitted` [B] tokens each after `gamma` guesses; none has left yet."""

    def rollout(self, requests: Sequence[Request], completions: Sequence[Completion], stats: RolloutStats) -> None:
        """One `generate` call is complete; `stats` are its own."""
