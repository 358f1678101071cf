"""The tail of a generation phase: how long ranks wait for the slowest, and what sharing it out would bring."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from spec_rollout.gamma import AcceptanceModel
from spec_rollout.simulate.replay import Costs, Decoding, Work


@dataclass(frozen=True)
class Phase:
    """A generation phase of several ranks.

    Attributes:
        seconds: until the slowest has finished.
        wait_s: of a rank for the slowest, on average.
        moved, reread: completions that another rank finished, and the tokens that it had to read for them.
    """

    seconds: float
    wait_s: float
    moved: int = 0
    reread: int = 0


def phase(
    shares: Sequence[Work],
    costs: Costs,
    slots: int,
    gamma: int | None,
    rates: Sequence[float],
    draft: AcceptanceModel | None = None,
    *,
    sharing: bool = False,
) -> Phase:
    """Decode `shares`, one by each rank.

    With `sharing`, a rank that has finished takes unfinished completions of the rank that has most, and reads prompts,
    and tokens so far of what had begun, anew. Noise is keyed by completion and place, so that these would be the same
    tokens. It takes as many as bring most, at most half, by lengths that nobody knows beforehand; and nothing is
    charged for telling the ranks of it. So what it brings is a bound.
    """
    ranks = [Decoding(share, costs, slots, gamma, rates, draft) for share in shares]
    moved = reread = 0
    looked: tuple | None = None
    while True:
        busy = [rank for rank in ranks if not rank.done]
        if not busy:
            break
        soonest = min(busy, key=lambda rank: rank.clock)
        donor = max(busy, key=lambda rank: rank.unfinished)
        idle = [rank for rank in ranks if rank.done and rank.clock <= soonest.clock] if sharing else []
        state = ranks.index(donor), donor.unfinished, len(idle)
        if idle and donor.unfinished > 1 and state != looked:
            looked = state
            given = donor.give(_worth_giving(donor, costs))
            if given:
                idle[0].take(given, now=donor.clock)
            moved, reread = moved + len(given), reread + sum(known for known, _, _ in given)
        else:
            soonest.step()
    seconds = max(rank.clock for rank in ranks)
    return Phase(seconds, statistics.mean(seconds - rank.clock for rank in ranks), moved, reread)


def _worth_giving(donor: Decoding, costs: Costs) -> int:
    """How many completions another rank should take; 0 where none brings anything."""
    rows = donor.rows_to_give()
    known, left = ([int(of[row]) for row in rows] for of in (donor.length, donor.left))
    context = max(known)

    def seconds(some: list[int]) -> float:
        """To draw so many tokens of each of some rows, one a step."""
        done, total = 0, 0.0
        for i, tokens in enumerate(sorted(some)):
            rows = min(len(some) - i, donor.scheduler.slots)
            total += (tokens - done) * float(costs.steps.step_seconds(rows, 1, context)[0][0])
            done = tokens
        return total

    def then(count: int) -> float:
        again = costs.prefill_seconds([tokens + 1 for tokens in known[:count]]) if count else 0.0
        return max(seconds(left[count:]), again + seconds(left[:count]))

    return min(range(len(rows) // 2 + 1), key=then)
