"""How a rollout is cut into spans, of which a sample is kept."""

from __future__ import annotations

import numpy as np

PACK_WIDTH = 512
"""Most entries of a packed row, and of a span: a short rollout is one span. The rows of short rollouts are narrower,
as attention grows with the square."""
STRIDE = PACK_WIDTH - 1
"""The last entry of a span is the first of the next: it has the state that the one before it learns from."""
CONTEXT = 128
"""Most entries of the prompt at the head of the first span."""


def first_entry(prompt: int | np.ndarray, number: int = 0) -> int | np.ndarray:
    """Where span `number` of a rollout begins that has a `prompt` of so many tokens."""
    return np.maximum(prompt - 1 - CONTEXT, 0) + STRIDE * number


def span_after(prompt: int | np.ndarray, entries: int | np.ndarray) -> int | np.ndarray:
    """The number of the span that a rollout is in after so many `entries`."""
    return np.maximum(entries - 1 - first_entry(prompt), 0) // STRIDE


def spans(prompt: int, entries: int) -> list[tuple[int, int]]:
    """First entry, and the one behind the last, of each span of a rollout that can be learned from."""
    first = int(first_entry(prompt))
    found = [(start, min(start + STRIDE + 1, entries)) for start in range(first, entries, STRIDE)]
    return [(start, stop) for start, stop in found if stop - max(start, prompt - 2) >= 2]
