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

    With `sharing`, a rank that has finished takes half of what is unfinished at the rank that has most, and reads
    prompts, and tokens so far of what had begun, anew. Noise is keyed by completion and place, so that these would be
    the same tokens. Nobody knows how long a completion will become. Nothing is charged for telling the ranks of it, so
    what it brings is a bound.
    """
    ranks = [Decoding(share, costs, slots, gamma, rates, draft) for share in shares]
    moved = reread = 0
    while True:
        busy = [rank for rank in ranks if not rank.done]
        if not busy:
            break
        soonest = min(busy, key=lambda rank: rank.clock)
        idle = [rank for rank in ranks if rank.done and rank.clock <= soonest.clock]
        donor = max(busy, key=lambda rank: rank.unfinished)
        if sharing and idle and donor.unfinished > 1:
            given = donor.give(donor.unfinished // 2)
            idle[0].take(given, now=donor.clock)
            moved, reread = moved + len(given), reread + sum(known for known, _, _ in given)
        else:
            soonest.step()
    seconds = max(rank.clock for rank in ranks)
    return Phase(seconds, statistics.mean(seconds - rank.clock for rank in ranks), moved, reread)
