"""Rollouts packed into rows of equal width, so that no training step computes padding between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spec_rollout.draft.features import Sample


class Pack(NamedTuple):
    """R rows of P entries; entry p of a rollout pairs its token p + 1 with the target's feature at p.

    tokens [R, P] int64, features [R, P, F], positions [R, P] int64 within the rollout, document [R, P] int64 (-1 for
    the unused end of a row), learn [R, P] bool: the next token is one that the policy sampled.
    """

    tokens: Tensor
    features: Tensor
    positions: Tensor
    document: Tensor
    learn: Tensor


def pack(samples: list[Sample], width: int) -> Pack:
    """Pack `samples` first-fit into rows of at most `width`, a multiple of 64 that takes the longest of them, or as
    long as that one."""
    longest = max(len(sample.features) for sample in samples)
    width = max(longest, min(width, -(-longest // 64) * 64))
    rows: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda s: -len(s.features)):
        size = len(sample.features)
        row = next((i for i, free in enumerate(room) if free >= size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(sample)
        room[row] -= size
    features = samples[0].features
    packed = Pack(
        torch.zeros(len(rows), width, dtype=torch.int64, device=features.device),
        features.new_zeros(len(rows), width, features.shape[1]),
        torch.zeros(len(rows), width, dtype=torch.int64, device=features.device),
        torch.full((len(rows), width), -1, dtype=torch.int64, device=features.device),
        torch.zeros(len(rows), width, dtype=torch.bool, device=features.device),
    )
    for r, documents in enumerate(rows):
        at = 0
        for document, sample in enumerate(documents):
            at = _place(packed, r, at, document, sample)
    return packed


def shuffled(samples: list[Sample], width: int, tokens: int, generator: torch.Generator) -> Iterator[Pack]:
    """Batches of about `tokens` tokens of all `samples`, packed in random order into rows of at most `width`."""
    order = torch.randperm(len(samples), generator=generator).tolist()
    packed = pack([samples[i] for i in order], width)
    rows = max(1, tokens // packed.tokens.shape[1])
    places = torch.randperm(len(packed.tokens), generator=generator).to(packed.tokens.device)
    for index in places.split(rows):
        yield Pack(*(x[index] for x in packed))


def _place(packed: Pack, row: int, at: int, document: int, sample: Sample) -> int:
    last = sample.first + len(sample.features)
    span = slice(at, at + len(sample.features))
    position = torch.arange(sample.first, last, device=packed.tokens.device)
    packed.tokens[row, span] = sample.tokens[1:]
    packed.features[row, span] = sample.features
    packed.positions[row, span] = position
    packed.document[row, span] = document
    # Entry p predicts token p + 2, and its target distribution is known where entry p + 1 exists.
    packed.learn[row, span] = (position + 2 >= sample.prompt) & (position + 1 < last)
    return span.stop
