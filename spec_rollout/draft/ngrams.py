"""Guesses from earlier rollouts: what followed there the longest run of tokens that now ends a row."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from spec_rollout.engine.gumbel_max import block_size, num_blocks
from spec_rollout.engine.rows import Rows

ORDERS = (1, 2, 3, 4, 6, 8)
"""Lengths of the runs that are looked up."""
LONGEST = ORDERS[-1]
CANDIDATES = 4
"""Tokens kept of those that followed a run."""
MAX_TOKENS = 2**18
"""Tokens of rollouts that are kept; the table that is made of them takes 88 MB at most."""
JUDGED = 3
"""Guesses whose acceptance is estimated."""


class NgramTable:
    """What followed each run of tokens in `sequences` [n] int64.

    Runs are known by 64-bit hashes, a sum over tokens of (id + 1) times a random number for the place. Two that
    collide would spoil a guess, never a sample.

    Attributes:
        keys [N + 1] int64, ascending: the runs' hashes, and the largest number that there is.
        tokens [N + 1, CANDIDATES] int64, scores [N + 1, CANDIDATES] float32: what followed, the most frequent first,
            and the logarithm of how often; -inf where there are fewer.
    """

    def __init__(self, sequences: Sequence[Tensor], device: torch.device):
        generator = torch.Generator().manual_seed(0)
        random = torch.randint(-(2**62), 2**62, (2, LONGEST), generator=generator).to(device) | 1
        self.factors, self.salts = random[0], random[1, : len(ORDERS)]
        orders = torch.tensor(ORDERS, device=device)
        back = torch.arange(LONGEST, 0, -1, device=device)[:, None]
        self.weights = random[0].flip(0)[:, None] * (back <= orders)  # [LONGEST, orders]
        self.constants = self.salts + self.weights.sum(0)
        self.rank = torch.arange(1, len(ORDERS) + 1, device=device)
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        self._pairs = empty, empty, empty
        """Each run and a token that followed it, by run, then by token, and how often: [E] each."""
        self.change(sequences, ())

    def change(self, added: Sequence[Tensor], gone: Sequence[Tensor]) -> None:
        """Count the sequences `added`, and those `gone` no more. What is there is not counted again."""
        parts = [self._pairs]
        for sequences, sign in ((added, 1), (gone, -1)):
            if sequences:
                keys, followers = self._runs(sequences)
                parts.append((keys, followers, torch.full_like(keys, sign)))
        keys, followers, counts = (torch.cat(part) for part in zip(*parts, strict=True))
        order = _order(keys, followers)
        keys, followers = keys[order], followers[order]
        first = _changes(keys) | _changes(followers)
        pair = first.cumsum(0) - 1
        counts = torch.zeros_like(keys[first]).index_add_(0, pair, counts[order])
        left = counts > 0
        self._pairs = keys[first][left], followers[first][left], counts[left]
        self._rank_followers()

    def _runs(self, sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The hash of each run and the token after it, [E] both."""
        device = self.factors.device
        tokens = torch.cat([s.to(device) for s in sequences])
        place = torch.cat([torch.arange(len(s), device=device) for s in sequences])
        hashes, keys, followers = torch.zeros_like(tokens), [], []
        for back in range(1, LONGEST + 1):
            hashes = hashes + (tokens.roll(back) + 1) * self.factors[back - 1]
            if back in ORDERS:
                within = place >= back
                keys.append(hashes[within] + self.salts[ORDERS.index(back)])
                followers.append(tokens[within])
        return torch.cat(keys), torch.cat(followers)

    def _rank_followers(self) -> None:
        """Keep the most frequent followers of each run."""
        keys, followers, counts = self._pairs
        order = _order(keys, -counts)
        keys, followers, counts = keys[order], followers[order], counts[order]
        starts = _changes(keys)
        run = starts.cumsum(0) - 1
        place = torch.arange(len(keys), device=keys.device) - starts.nonzero()[:, 0][run]
        kept = place < CANDIDATES
        self.keys = torch.cat([keys[starts], keys.new_tensor([torch.iinfo(torch.int64).max])])
        size = len(self.keys), CANDIDATES
        self.tokens = torch.zeros(size, dtype=torch.int64, device=keys.device)
        self.scores = torch.full(size, -torch.inf, device=keys.device)
        self.tokens[run[kept], place[kept]] = followers[kept]
        self.scores[run[kept], place[kept]] = counts[kept].float().log()
        self.shares = self.scores.softmax(1)
        self._of_vocabulary = 0

    def find(self, recent: Tensor) -> tuple[Tensor, Tensor]:
        """Where the table has the longest known run that ends `recent` [B, LONGEST], the newest token last, -1 before
        the first, and whether there is one; [B] both."""
        hashes = (recent[:, :, None] * self.weights).sum(1) + self.constants  # [B, orders]
        at = torch.searchsorted(self.keys, hashes)
        rank, longest = ((self.keys[at] == hashes) * self.rank).max(1, keepdim=True)
        return at.gather(1, longest)[:, 0], rank[:, 0] > 0

    def draw(self, found: Tensor, noise: Tensor | None, vocab_size: int) -> tuple[Tensor, Tensor]:
        """What followed the runs `found` [B], and its share of their followers, [B, 1] both: a Gumbel-max sample of
        the counts under the target's noise [B, noise_width(vocab_size)], the most frequent follower without noise.

        What `gumbel_max.draw_among` would draw, with all that depends on the table alone computed beforehand.
        """
        if noise is None:
            return self.tokens[found, :1], self.shares[found, :1]
        if self._of_vocabulary != vocab_size:
            self._prepare(vocab_size)
        scores = noise.gather(1, self.columns[found]).add_(self.logs[found])
        blocks, places = scores.split(CANDIDATES, 1)
        chosen = places.masked_fill_(blocks < blocks.amax(1, keepdim=True), -torch.inf).argmax(1, keepdim=True)
        return self.tokens[found].gather(1, chosen), self.shares[found].gather(1, chosen)

    def _prepare(self, vocab_size: int) -> None:
        """For each candidate, the columns of the noise of its block and of its place in that, and beside them the
        logarithms of what its block and itself were counted; [N + 1, 2 * CANDIDATES] both."""
        size, count = block_size(vocab_size), num_blocks(vocab_size)
        block = self.tokens // size
        together = (block[:, :, None] == block[:, None, :]) * self.scores.exp()[:, None, :]
        self.columns = torch.cat([block, self.tokens % size + count], 1)
        self.logs = torch.cat([together.sum(2).log().where(self.scores > -torch.inf, -torch.inf), self.scores], 1)
        self._of_vocabulary = vocab_size

    def guess(self, recent: Tensor, gamma: int, noise: Tensor | None, vocab_size: int) -> Tensor:
        """Guesses [B, gamma] after `recent`, each drawn with the target's noise [B, >= gamma, noise_width]; anything
        where no run is known."""
        guesses = []
        for i in range(gamma):
            found, _ = self.find(recent)
            guesses.append(self.draw(found, None if noise is None else noise[:, i], vocab_size)[0])
            recent = torch.cat([recent[:, 1:], guesses[-1]], 1)
        return torch.cat(guesses, 1)

    def hits(self, sequence: Tensor, start: int) -> Tensor:
        """For each token of `sequence` from `start` on, whether it follows most often on those before it."""
        before = torch.cat([sequence.new_full((LONGEST,), -1), sequence[:-1]]).unfold(0, LONGEST, 1)
        return self.tokens[self.find(before[start:])[0], 0] == sequence[start:]


def recent_tokens(rows: Rows) -> Tensor:
    """The last tokens [B, LONGEST] of the active rows, -1 before the first, for `NgramTable.find`."""
    place = rows.length[: rows.count, None] + torch.arange(1 - LONGEST, 1, device=rows.device)
    recent = rows.tokens[: rows.count].gather(1, place.clamp(min=0))
    return torch.where(place < 0, -1, recent)


class History:
    """The latest rollouts, at most MAX_TOKENS tokens of them, and what they give to guess from.

    Attributes:
        acceptance: rates at which the most frequent follower is the first, second … token, measured on rollouts that
            the table had not seen; empty before there are two.
        seconds: what making the table took last.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.sequences: list[Tensor] = []
        self.acceptance: list[float] = []
        self.seconds = 0.0
        self._table = NgramTable((), device)
        self._added: list[Tensor] = []
        self._gone: list[Tensor] = []
        """What the table does not know of yet."""

    def __bool__(self) -> bool:
        return bool(self.sequences)

    @property
    def table(self) -> NgramTable:
        """Brought up to date after rollouts have been added."""
        if self._added or self._gone:
            began = time.perf_counter()
            self._table.change(self._added, self._gone)
            self._added, self._gone = [], []
            self.seconds = time.perf_counter() - began
        return self._table

    def add(self, rollouts: Iterable[tuple[Sequence[int], Sequence[int]]]) -> None:
        """Take in prompts and completions, the token ids of both, of one phase."""
        pairs = [(torch.tensor([*p, *c], device=self.device), len(p)) for p, c in rollouts]
        half = 0 if self.sequences else len(pairs) // 2  # the first phase is judged by its first half
        self._keep([sequence for sequence, _ in pairs[:half]])
        if self.sequences:
            self._judge([self.table.hits(sequence, start) for sequence, start in pairs[half:]])
        self._keep([sequence for sequence, _ in pairs[half:]])

    def _keep(self, sequences: list[Tensor]) -> None:
        """The table counts `sequences` too, and no longer the oldest ones beyond MAX_TOKENS."""
        self.sequences += sequences
        self._added += sequences
        total = 0
        for kept, sequence in enumerate(reversed(self.sequences)):
            total += len(sequence)
            if total > MAX_TOKENS and kept:
                oldest = len(self.sequences) - kept
                self._gone += self.sequences[:oldest]
                del self.sequences[:oldest]
                break

    def _judge(self, hits: Sequence[Tensor]) -> None:
        """The guess after a number of guesses that came true is made in a context that is the row's own by then."""
        left = torch.cat([torch.arange(len(h) - 1, -1, -1, device=h.device) for h in hits])  # to the end of each
        every = torch.cat(list(hits))
        counts, reached = [], torch.ones_like(every)
        for ahead in range(JUDGED):
            reached = reached & (left >= ahead)
            come_true = reached & every.roll(-ahead)
            counts.append(torch.stack([come_true.sum(), reached.sum()]))
            reached = come_true
        self.acceptance = [true / max(1, of) for true, of in torch.stack(counts).tolist()]


def _order(keys: Tensor, values: Tensor) -> Tensor:
    """What sorts both, by key, then by value."""
    order = values.argsort(stable=True)
    return order[keys[order].argsort(stable=True)]


def _changes(values: Tensor) -> Tensor:
    """Where a value differs from the one before it; True at the first."""
    return torch.cat([values.new_ones(min(1, len(values)), dtype=torch.bool), values[1:] != values[:-1]])
