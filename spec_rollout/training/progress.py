"""A bar over a rollout that takes long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from spec_rollout.backends.embedded import EmbeddedBackend

DELAY = 10.0
"""Seconds of a rollout before its bar is shown."""


@contextmanager
def rollout_bar(backend: EmbeddedBackend, total: int, shown: bool) -> Iterator[None]:
    """While `backend` draws `total` completions: how many are finished, and tokens per second."""
    if not shown:
        yield
        return
    began, tokens = time.perf_counter(), 0
    with tqdm(total=total, desc="rollout", unit="completion", delay=DELAY, leave=False) as bar:

        def step(unfinished: int, emitted: int) -> None:
            nonlocal tokens
            tokens += emitted
            bar.set_postfix({"tokens/s": f"{tokens / (time.perf_counter() - began):.0f}"}, refresh=False)
            bar.update(total - unfinished - bar.n)

        backend.engine.progress = step
        try:
            yield
        finally:
            backend.engine.progress = None
