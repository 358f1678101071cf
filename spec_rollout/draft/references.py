"""Drafters whose quality is known beforehand: the two ends between which a learned head lies. For checks and tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spec_rollout.engine.rows import Rows
from spec_rollout.engine.transfers import Slots
from spec_rollout.records import Completion


class RandomDrafter:
    """Guesses uniformly; about 1 in V guesses comes true. Has a random stream of its own."""

    ready = True

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def slot_bytes(self, capacity: int) -> int:
        return 0

    def begin(self, rows: Rows) -> None:
        pass

    def end(self) -> None:
        pass

    def resize(self, rows: Rows, kept: int) -> None:
        pass

    def propose(self, rows: Rows, gamma: int, noise: Tensor | None, temperature: float) -> Tensor:
        guesses = torch.randint(rows.vocab_size, (rows.count, gamma), generator=self.generator)
        return guesses.to(rows.device)

    def proposal(self) -> None:
        """Whatever it guesses is not drawn by the noise."""

    def read(self, rows: Rows, slots: tuple[int, int], start: np.ndarray, hidden: Sequence[Tensor]) -> None:
        pass

    def observe(self, rows: Rows, slots: tuple[int, int], start: Tensor, hidden: Sequence[Tensor]) -> None:
        pass

    def admit(self, rows: Rows, slots: tuple[int, int]) -> None:
        pass

    def copy(self, rows: Rows, source: Slots, target: Slots) -> None:
        pass

    def finish(self, rows: Rows, slots: Slots) -> None:
        pass


class OracleDrafter(RandomDrafter):
    """Knows the completions beforehand: every guess comes true, or none if `shift` is added to each token id."""

    def __init__(self, completions: Sequence[Completion], shift: int = 0):
        self.completions, self.shift = completions, shift

    def begin(self, rows: Rows) -> None:
        width = max(len(c.token_ids) for c in self.completions) + 1
        known = [[*c.token_ids, *[0] * (width - len(c.token_ids))] for c in self.completions]
        self.known = torch.tensor(known, device=rows.device)

    def propose(self, rows: Rows, gamma: int, noise: Tensor | None, temperature: float) -> Tensor:
        place = rows.progress()[:, None] + torch.arange(gamma, device=rows.device)
        place = place.clamp(max=self.known.shape[1] - 1)
        return (self.known[rows.request[: rows.count, None], place] + self.shift) % rows.vocab_size
