"""A head and the table of earlier rollouts guess together: at each place whoever has been right more often in such."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spec_rollout.draft.head_passes import Guess
from spec_rollout.draft.ngrams import History, recent_tokens
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.engine.rows import Rows

SURE = (0.3, 0.6, 0.9)
"""Bounds between guesses that were more and less probable to the one who made them."""
TYPICAL = (0.15, 0.45, 0.75, 0.95)
"""Such guesses come true about as often: what is taken of them before any has been judged."""
PLACES = 4
"""The first, second and third guess of a step are judged apart from each other and from all later ones."""
KEPT = 0.5
"""Share of what was counted that still counts after the head has changed."""
AGREEING = 0.5
"""Of the places where the less reliable of two is right and the other wrong, the share that the choice finds: with
rates a ≥ b it then guesses right at the rate a + (1 - a) b / 2 (docs/measured.md)."""


class Arbiter:
    """Chooses, in each row and at each place, between a head's guess and that of the table of `history`.

    Where the two differ, it takes the one that has been right more often at places alike: at the same guess of a step,
    and with as much probability given to both guesses by those who made them. Nothing that it does changes a token.

    Attributes:
        right [PLACES * 16, 2] float32: how often the table, and the head, was right where they differed.
        taken: how many guesses were the table's, a scalar on the device, since `begin`.
    """

    def __init__(self, history: History, view: PolicyView):
        self.history, self.view = history, view
        typical = torch.tensor(TYPICAL, device=history.device)
        pairs = torch.cartesian_prod(typical, typical)
        self.right = pairs.repeat(PLACES, 1)
        self._bounds = torch.tensor(SURE, device=history.device)
        self._made: list[tuple[Tensor, ...]] = []

    def head_changed(self) -> None:
        self.right *= KEPT

    def begin(self) -> None:
        """A rollout starts."""
        self.table = self.history.table
        self.taken = self.right.new_zeros((), dtype=torch.int64)
        self._made = []

    def start(self, rows: Rows) -> None:
        """The active `rows` are about to be guessed for."""
        self._recent = recent_tokens(rows)
        self._prefers_table = self.right[:, 0] > self.right[:, 1]
        self._made = []

    def choose(self, guess: Guess, noise: Tensor | None) -> Guess:
        """The head's `guess` at the next place, or the table's under the same `noise` [B, N], row by row."""
        found, known = self.table.find(self._recent)
        other, share = self.table.draw(found, noise, self.view.config.vocab_size)
        sure = torch.cat([share, self._probability(guess)], 1)
        table, head = torch.bucketize(sure, self._bounds).unbind(1)
        kind = (min(len(self._made), PLACES - 1) * len(TYPICAL) + table) * len(TYPICAL) + head
        taken = known & self._prefers_table[kind]
        differ = known & (other != guess.tokens)[:, 0]
        self._made.append((other[:, 0], guess.tokens[:, 0], kind, differ))
        self.taken += taken.sum()
        best = torch.where(taken[:, None], other, guess.tokens)
        self._recent = torch.cat([self._recent[:, 1:], best], 1)
        return guess._replace(tokens=best)

    def _probability(self, guess: Guess) -> Tensor:
        """What the head gave its own guess, [B, 1]."""
        ids = self.view.draft_ids
        index = guess.tokens if ids is None else torch.searchsorted(ids, guess.tokens)
        return (guess.scores.gather(1, index) - guess.scores.logsumexp(1, keepdim=True)).exp()

    def observe(self, rows: Rows, start: Tensor) -> None:
        """The policy has drawn what stands in the active `rows` behind `start` [B], the places before the guesses."""
        if not self._made:
            return
        other, own, kind, differ = (torch.stack(parts, 1) for parts in zip(*self._made, strict=True))  # [B, γ]
        self._made = []
        place = start[:, None] + torch.arange(1, other.shape[1] + 1, device=start.device)
        drawn = rows.tokens[: rows.count].gather(1, place.clamp(max=rows.tokens.shape[1] - 1))
        judged = differ & (place <= rows.length[: rows.count, None])
        right = torch.stack([judged & (other == drawn), judged & (own == drawn)], -1)
        self.right.index_add_(0, kind.flatten(), right.flatten(0, 1).to(self.right.dtype))


def joint_rates(head: Sequence[float], table: Sequence[float]) -> list[float]:
    """Acceptance rates to expect of both together, from those of each alone; the last of a list goes on."""
    if not head or not table:
        return list(head or table)
    found = []
    for i in range(max(len(head), len(table))):
        less, more = sorted((head[min(i, len(head) - 1)], table[min(i, len(table) - 1)]))
        found.append(more + AGREEING * (1 - more) * less)
    return found
