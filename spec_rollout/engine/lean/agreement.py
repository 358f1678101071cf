"""Whether the lean pass computes what the policy's own forward computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spec_rollout.engine.kv_cache import SlotCache

ROWS, PROMPT, WIDTH, EXTENT = 3, 12, 4, 48
BOUND = 1e-5
"""Of the logits' standard deviation, beside twice what the policy's own passes of different shape differ by. In
bfloat16 that is often nothing at all, and then the lean pass has to compute the same bits."""

Forward = Callable[[SlotCache, tuple[int, int], Tensor, Tensor, int], tuple[Tensor, object]]


def disagreement(
    own: Forward, canonical: Callable, lean: Forward, vocab_size: int, kind: tuple[torch.dtype, torch.device]
) -> float:
    """The largest difference of the logits of `own` and `lean`, as a multiple of what is allowed: above 1 they do not
    compute the same. Three rows of different length are read in passes of four tokens and of one, some of them in the
    place of guesses that did not come true. NaN where either is.

    `own` and `lean` take (cache, slots, ids [B, T], positions [B, T], extent); `canonical` gives the logits of whole
    rows of ids, all [B, T, V]. `kind` is what the cache is made of.
    """
    device = kind[1]
    ids = (torch.arange(ROWS * (PROMPT + 2 * WIDTH), device=device) * 7 % vocab_size).view(ROWS, -1)
    prompts = torch.arange(PROMPT, device=device).expand(ROWS, -1)
    start = torch.tensor([[PROMPT - 1], [PROMPT // 2], [2]], device=device)
    along = torch.arange(WIDTH, device=device)

    def read(forward: Forward, passes: list[Tensor]) -> list[Tensor]:
        cache = SlotCache()
        cache.allocate(ROWS, EXTENT + 1, kind)
        own(cache, (0, ROWS), ids[:, :PROMPT], prompts, PROMPT)
        results = (forward(cache, (0, ROWS), ids.gather(1, place), place, EXTENT)[0] for place in passes)
        return [logits.to(torch.float32, copy=True) for logits in results]  # the next pass may overwrite them

    wide = [start + along, start + 2 + along]  # the second begins where two of the first were rejected
    narrow = [wide[0], *(start + 2 + i for i in along)]
    expected = read(own, wide)[1]
    apart = torch.cat(read(own, narrow)[1:], 1)
    whole = canonical(ids[:, : PROMPT + 2 * WIDTH - 2])
    at_once = whole.gather(1, wide[1][..., None].expand_as(expected)).float()
    noise = max((other - expected).abs().max() for other in (apart, at_once))
    got = (read(lean, wide)[1], torch.cat(read(lean, narrow)[1:], 1))
    allowed = BOUND * expected.std() + 2 * noise
    return float(max((logits - expected).abs().max() for logits in got) / allowed)
