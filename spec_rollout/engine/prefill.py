"""Prefill: the prompts of new rows, read once each and shared by the siblings of a group."""

from __future__ import annotations

import torch

from spec_rollout.engine.guarded_drafter import GuardedDrafter
from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.scheduler import Admission
from spec_rollout.engine.target import Target

PREFILL_TOKENS = 4096
"""Most tokens of one prefill pass, padding included, unless a single prompt is longer."""


def prefill(target: Target, cache: SlotCache, rows: Rows, admission: Admission, draft: GuardedDrafter) -> None:
    """Read all prompt tokens of the fresh rows but the last, which the first verify pass takes; show the drafter what
    the target computed."""
    admitted = (admission.first, admission.first + len(admission.fresh))
    cache.clear(admitted)
    for slots, width in admission.passes(PREFILL_TOKENS):
        width = max(width, 2)  # see Target.reads_pairs
        place = torch.arange(width, device=rows.device).expand(slots[1] - slots[0], -1)
        ids = rows.tokens[slots[0] : slots[1], :width]
        lengths = rows.length[slots[0] : slots[1]]
        _, hidden = target.forward(cache, slots, ids, place, cache.extent(width), keep_logits=1, lengths=lengths)
        draft.call("observe", rows, slots, place[:, 0], hidden)
    if admission.fresh:
        draft.call("admit", rows, admitted)
