"""Where memory runs out in a rollout: how that shows, and which option to lower."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from spec_rollout.engine.room import GIB
from spec_rollout.records import RolloutMemoryError

CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
"""What torch says on a CPU, in a plain RuntimeError."""
REMEDIES = {
    "max_cache_gib": "what slots may take; rows that do not fit then wait, and the tokens are the same",
    "max_completion_length": "max_new_tokens of an engine: a single row takes it all",
    "max_slots": "rows that are decoded at the same time",
    "max_feature_tokens": "what is kept to train the draft on",
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is what Python, torch on a CUDA device or torch on a CPU raises where memory runs out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)


def what_to_lower(error: BaseException, sizes: Mapping[str, int]) -> RolloutMemoryError:
    """What to raise in the place of `error`; `sizes` are the bytes that each option of REMEDIES had taken, or was
    about to take."""
    sizes = {name: size for name, size in sizes.items() if size} or {"max_slots": 0}
    name = max(sizes, key=sizes.get)
    others = ", ".join(f"{other} {size / GIB:.3g} GiB" for other, size in sizes.items() if other != name)
    return RolloutMemoryError(
        f"Memory ran out in a rollout. Lower {name} ({REMEDIES[name]}), which took the most, {sizes[name] / GIB:.3g} "
        f"GiB{others and '; besides, ' + others}. The policy is as it was, what the rollout took has been given back, "
        f"and it can be asked for again. It was: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    )
