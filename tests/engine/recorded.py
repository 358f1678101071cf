"""A rollout that remembers the logits from which each token was sampled."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

import torch

from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.rollout import Rollout
from spec_rollout.records import Completion, SamplingParams

Logits = dict[tuple[int, int], torch.Tensor]
"""Logits [V] float32 by (request, completion position)."""


def recorded(
    engine: RolloutEngine, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> tuple[list[Completion], Logits]:
    """The completions, and the logits of the verify pass behind each of their tokens."""
    store: Logits = {}

    class Recorder(Rollout):
        def sample_and_verify(self, logits, noise, guesses):
            progress = self.rows.progress().tolist()
            samples, verdict = super().sample_and_verify(logits, noise, guesses)
            for row, emitted in enumerate(verdict.emitted.tolist()):
                for place in range(emitted):
                    store[int(self.rows.request[row]), progress[row] + place] = logits[row, place].float()
            return samples, verdict

    with patch("spec_rollout.engine.engine.Rollout", Recorder):
        return engine.generate(prompts, params), store


def common(a: Sequence[Completion], b: Sequence[Completion]) -> list[tuple[int, int]]:
    """(request, position) up to and including the first token in which two runs differ: same context in both."""
    places = []
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        for position, (one, other) in enumerate(zip(x.token_ids, y.token_ids, strict=False)):
            places.append((index, position))
            if one != other:
                break
    return places


def difference(a: Logits, b: Logits, places: Sequence[tuple[int, int]]) -> float:
    """The largest difference between two runs' logits at `places`."""
    return max(float((a[place] - b[place]).abs().max()) for place in places)
