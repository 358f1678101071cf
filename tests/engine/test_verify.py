"""The verdict on a step, against a loop that reads as the definition."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_rollout.engine.verify import verify


def by_definition(guesses, samples, remaining, stops) -> tuple[int, int, int, int]:
    """Emit the target's samples one by one until one ends the row, fills it, or differs from its guess."""
    accepted = emitted = ended = full = 0
    for place, sample in enumerate(samples):
        emitted += 1
        came_true = place < len(guesses) and guesses[place] == sample
        accepted += came_true
        ended, full = int(stops[place]), int(emitted == remaining)
        if ended or full or not came_true:
            break
    return accepted, emitted, ended, full


@st.composite
def steps(draw):
    rows, gamma = draw(st.integers(1, 5)), draw(st.integers(0, 7))
    token = st.integers(0, 2)
    return [
        (
            draw(st.lists(token, min_size=gamma, max_size=gamma)),
            draw(st.lists(token, min_size=gamma + 1, max_size=gamma + 1)),
            draw(st.integers(1, 10)),
            draw(st.lists(st.sampled_from([False, False, False, True]), min_size=gamma + 1, max_size=gamma + 1)),
        )
        for _ in range(rows)
    ]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(steps())
def test_verify(rows):
    guesses, samples, remaining, stops = zip(*rows, strict=True)
    verdict = verify(
        torch.tensor(guesses, dtype=torch.int64).view(len(rows), -1),
        torch.tensor(samples),
        torch.tensor(remaining),
        torch.tensor(stops),
    )
    assert all(v.dtype == torch.int64 and v.shape == (len(rows),) for v in verdict)
    assert list(zip(*(v.tolist() for v in verdict), strict=True)) == [by_definition(*row) for row in rows]
