"""How many rows of how many tokens fit into a bound of bytes, and what of the device is free."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from spec_rollout.engine.kv_cache import EXTENT_STEP, rounded_up
from spec_rollout.records import CacheBoundError

GIB = 2**30
SHARE = 0.5
"""Of the memory that is free at the first rollout, what slots may take where no bound is given."""
GROWTH = 8
"""Slots that are too short grow by a part in so many at least. Each entry is then moved about as often in its life,
which is little beside being read by every token after it."""


@dataclass(frozen=True)
class Room:
    """The `bound` of all slots in bytes (None without one), what one takes for each token, what besides, and what the
    draft keeps `beside` it in a slot of so many tokens."""

    bound: int | None
    token_bytes: int
    slot_bytes: int = 0
    beside: Callable[[int], int] = lambda capacity: 0

    def bytes(self, slots: int, capacity: int) -> int:
        """What `slots` of `capacity` tokens take."""
        return slots * (self.slot_bytes + capacity * self.token_bytes + self.beside(capacity))

    def holds(self, slots: int, capacity: int) -> bool:
        """Whether `slots` of `capacity` tokens stay within the bound."""
        return self.bound is None or self.bytes(slots, capacity) <= self.bound

    def left(self, slots: int, capacity: int) -> int:
        """Bytes of the bound that `slots` of `capacity` tokens leave."""
        return self.bound - self.bytes(slots, capacity)

    def too_long(self, index: int, tokens: int, ahead: int) -> CacheBoundError:
        """A row of prompt `index` with `tokens` tokens, to which a pass adds `ahead`, does not fit by itself."""
        most = self.longest - ahead + 1
        return CacheBoundError(
            f"Prompt {index} with its completion so far has {tokens} tokens, and max_cache_gib="
            f"{self.bound / GIB:.3g} ({self.bound} bytes) holds {max(most, 0)} of a single row: raise max_cache_gib, "
            "or shorten the prompt or the completions."
        )

    @property
    def longest(self) -> int:
        """The most tokens that a single slot can have within the bound."""
        entries = range(0, self.bound // self.token_bytes + 1, EXTENT_STEP)
        return (bisect_right(entries, self.bound, key=partial(self.bytes, 1)) - 1) * EXTENT_STEP

    def grown(self, needed: int) -> int:
        """How long slots become that have to take `needed` tokens, if the bound allows it."""
        return rounded_up(needed + needed // GROWTH)

    def capacity(self, slots: int, needed: int, most: int) -> int:
        """How long `slots` become that have to take `needed` tokens: `grown` as far as that is within the bound, and
        never longer than `most`."""
        wanted = min(self.grown(needed), rounded_up(most))
        while wanted > rounded_up(needed) and not self.holds(slots, wanted):
            wanted -= EXTENT_STEP
        return wanted


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on `device`, what torch keeps for later included; None where it is not known."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        return None
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), free)
        return min([free, *_left_in_group()])
    except (OSError, ValueError, AttributeError):
        return None


def _left_in_group(folder: str = "/sys/fs/cgroup") -> list[int]:
    """What the process's container still allows, if it has a limit."""
    try:
        limit, used = (Path(folder, name).read_text().strip() for name in ("memory.max", "memory.current"))
        return [] if limit == "max" else [max(0, int(limit) - int(used))]
    except (OSError, ValueError):
        return []
