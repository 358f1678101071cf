"""Which way round a matrix product of few tokens is the faster one on this machine's CPU.

With tokens as rows x [N, in] the product is x Wᵀ, with tokens as columns x [in, N] it is W x. The sums are the same,
but BLAS takes other kernels for them, and on some CPUs those of the second are up to twice as fast, where tokens are
few if they lie in memory one after the other.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

FEW = 16
"""From so many tokens on it does not matter how columns lie in memory, and what is not turned round costs less."""
TOKENS, SIZE, WEIGHTS, TURNS = 4, 512, 24, 7
"""What is timed: TOKENS through each of WEIGHTS matrices of 1 MiB, as many as no cache of a core holds."""
GAIN = 1.15
"""How many times as fast columns have to be, to be taken."""

_found: dict[int, bool] = {}
"""By the number of threads."""


def tokens_as_columns(like: Tensor) -> bool:
    """Whether tokens are better columns in products with weights such as `like`; timed once, in some 0.1 s."""
    if like.dtype != torch.float32 or like.device.type != "cpu":
        return False
    threads = torch.get_num_threads()
    if threads not in _found:
        rows, columns = _seconds()
        _found[threads] = rows >= GAIN * columns
    return _found[threads]


def columns_like(memory: Tensor, tokens: int) -> Tensor:
    """`memory` of `tokens` · n numbers as columns [n, tokens] that products read fast."""
    return memory.view(tokens, -1).t() if tokens < FEW else memory.view(-1, tokens)


def _seconds() -> tuple[float, float]:
    """The least that all products took with tokens as rows, and as columns."""
    x, by_rows, by_columns = (torch.ones(TOKENS, SIZE) for _ in range(3))
    weights = list(torch.ones(WEIGHTS, SIZE, SIZE))
    ways = (
        [(x, weight.t(), by_rows) for weight in weights],
        [(weight, x.t(), by_columns.view(SIZE, TOKENS)) for weight in weights],
    )
    found: tuple[list[float], list[float]] = [], []
    with torch.no_grad():
        for _ in range(TURNS):
            for products, seconds in zip(ways, found, strict=True):
                began = time.perf_counter()
                for a, b, out in products:
                    torch.mm(a, b, out=out)
                seconds.append(time.perf_counter() - began)
    return min(found[0]), min(found[1])
