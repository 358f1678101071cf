"""Gumbel noise as a pure function of (request key, position, token), from a counter-based generator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def request_keys(seed: Sequence[int], count: int) -> list[tuple[int, int]]:
    """`count` distinct 64-bit keys, as pairs of signed 32-bit words, from any sequence of non-negative integers.

    NumPy's `SeedSequence` mixes the integers, so neighbouring seeds, ranks and steps share nothing.
    """
    words = np.random.SeedSequence(list(seed)).generate_state(2 * count, np.uint32).view(np.int32)
    return [tuple(pair) for pair in words.reshape(count, 2).tolist()]


def threefry(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Threefry-2x32-20: two words of 32 random bits per counter.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). All tensors are int32 and broadcast; it
    needs only additions, rotations and exclusive or, which wrap on int32 as they do on uint32.
    """
    k0, k1 = key
    keys = (k0, k1, k0 ^ k1 ^ PARITY)
    x0, x1 = counter[0] + k0, counter[1] + k1
    x0, x1 = (x.contiguous() for x in torch.broadcast_tensors(x0, x1))
    spare = torch.empty_like(x0)
    for block in range(5):
        for rotation in ROTATIONS[block % 2]:
            x0 += x1
            torch.bitwise_right_shift(x1, 32 - rotation, out=spare)
            spare &= (1 << rotation) - 1  # the shift of an int32 drags its sign along
            x1 <<= rotation
            x1 |= spare
            x1 ^= x0
        x0 += keys[(block + 1) % 3]
        x1 += keys[(block + 2) % 3] + (block + 1)
    return x0, x1


def gumbel(keys: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [B, T, V] float32 for request `keys` [B, 2] int32 at `positions` [B, T].

    31 of the 32 bits make a uniform u, and u the exponential variable -log1p(-u). That keeps its precision near 0,
    where the winners of a Gumbel race are decided: the largest noise is 22.2.
    """
    half = (vocab_size + 1) // 2
    lane = torch.arange(half, dtype=torch.int32, device=keys.device)
    key = (keys[:, 0, None, None], keys[:, 1, None, None])
    words = torch.cat(threefry(key, (lane, positions.to(torch.int32)[:, :, None])), dim=-1)[..., :vocab_size]
    uniform = words.bitwise_and_(0x7FFFFFFF).float().mul_(2.0**-31).add_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()
