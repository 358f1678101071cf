"""How much of what was decoded in two ways is the same."""

from __future__ import annotations

import itertools
import math

from spec_rollout.records import Completion


def identical_share(found: list[Completion], expected: list[Completion]) -> float:
    """The share of the tokens of `found` that come before the first of their completion that differs."""
    same = 0
    for mine, theirs in zip(found, expected, strict=True):
        pairs = zip(mine.token_ids, theirs.token_ids, strict=False)
        same += sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return same / max(1, sum(len(c.token_ids) for c in found))


def shown(share: float) -> str:
    """100 % only if it is all."""
    return "100 %" if share == 1 else f"{math.floor(share * 10_000) / 100:.2f} %"
