"""Passes that are recorded once for a shape and replayed: CUDA graphs, which the host launches at once."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from spec_rollout.engine.compiled import NotCompilableError
from spec_rollout.engine.kv_cache import EXTENT_STEP, SlotCache
from spec_rollout.engine.lean.lean_pass import LeanPass
from spec_rollout.engine.lean.views import Streams

KEPT = 96
"""Recordings of a pass that are kept."""
AFTER = 2
"""How often a shape has to come before it is recorded. Most of those that come once never come again."""

Run = Callable[..., tuple[Tensor, ...]]


class Recorder(Protocol):
    works: bool
    """Whether nothing has failed yet."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Does the work of `run`; what is returned does it again, on the same memory."""


class CudaGraphs:
    """Records by `torch.cuda.graph`."""

    works = True

    def __init__(self):
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()  # libraries choose and allocate at a first call, which cannot be recorded
        torch.cuda.current_stream().wait_stream(aside)
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                run()
        except RuntimeError as error:
            raise NotCompilableError.of("a decode pass as a CUDA graph", str(error).splitlines()[0]) from error
        return graph.replay


def recorder(device: torch.device) -> Recorder | None:
    """What records on `device`; None where nothing does, as on a CPU."""
    return CudaGraphs() if device.type == "cuda" and CudaGraphs.works else None


@dataclass
class Recording:
    inputs: tuple[Tensor, ...]
    replay: Callable[[], None]
    outputs: tuple[Tensor, ...]
    held: Any
    """What the recorded operations read and write besides. It and the outputs have to stay where they are."""


class Graphs:
    """The recordings of one pass over a slot cache.

    Rows are padded to a few sizes, and the entries that are read rounded up, so that few shapes are recorded. What is
    returned is overwritten by a later call. Padding writes to the last entry of its slot, which nothing else reads:
    slots beyond the active ones may hold what is to be kept.

    What cannot be recorded is an error if `strict`; else it is told once, and nothing is recorded from there on.
    """

    def __init__(self, recorder: Recorder, strict: bool):
        self._recorder, self._strict = recorder, strict
        self._first: Tensor | None = None
        self._seen: Counter[tuple] = Counter()
        self._outputs: tuple[Tensor, ...] = ()
        """Where all recordings leave what they compute: each of its own would keep its logits for itself."""
        self._kept: dict[tuple, Recording] = {}

    def __call__(
        self, run: Run, cache: SlotCache, inputs: Sequence[Tensor], place: int, extent: int, hold: Callable[..., Any]
    ) -> tuple[Tensor, ...]:
        """`run(*inputs, extent)`, for `inputs` [B, T, …] of which number `place` says where tokens lie in their slots;
        its outputs [B · T, …]. `hold(rows, width)` is what it uses besides."""
        rows, width = inputs[place].shape
        self._follow(cache)
        shape = min(rows_recorded(rows), cache.slots), width, min(extent_recorded(extent), cache.capacity)
        self._seen[shape] += 1
        if self._seen[shape] < AFTER or not self._recorder.works:
            return run(*inputs, extent)
        found = self._kept.get(shape) or self._record(run, cache, inputs, place, shape, hold)
        if found is None:
            return run(*inputs, extent)
        for ours, given in zip(found.inputs, inputs, strict=True):
            ours[:rows].copy_(given)
        found.inputs[place][rows:].fill_(cache.capacity - 1)
        found.replay()
        return tuple(output[: rows * width] for output in found.outputs)

    def _follow(self, cache: SlotCache) -> None:
        """What was recorded on other buffers is void."""
        if cache.keys[0] is not self._first:
            self._first = cache.keys[0]
            self._kept.clear()

    def _record(
        self, run: Run, cache: SlotCache, inputs: Sequence[Tensor], place: int, shape: tuple, hold: Callable[..., Any]
    ) -> Recording | None:
        rows, width, extent = shape
        ours = tuple(given.new_zeros(rows, *given.shape[1:]) for given in inputs)
        ours[place].fill_(cache.capacity - 1)
        outputs, held = self._room(rows * width, run(*ours, extent)), hold(rows, width)

        def fill() -> None:
            for output, made in zip(outputs, run(*ours, extent), strict=True):
                output.copy_(made)

        try:
            replay = self._recorder.record(fill)
        except NotCompilableError as error:
            if self._strict:
                raise
            type(self._recorder).works = False
            warnings.warn(f"{error} With 'auto' it is decoded without from here on.", RuntimeWarning, stacklevel=2)
            return None
        if len(self._kept) == KEPT:
            self._kept.pop(next(iter(self._kept)))
        self._kept[shape] = Recording(ours, replay, outputs, held)
        return self._kept[shape]

    def _room(self, tokens: int, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Room for `tokens` rows of outputs like these."""
        if not self._outputs or len(self._outputs[0]) < tokens:
            self._outputs = tuple(one.new_empty(1 << (tokens - 1).bit_length(), *one.shape[1:]) for one in like)
        return tuple(output[:tokens] for output in self._outputs)


class GraphedPass:
    """Computes what `lean` computes."""

    path, columns = "lean graphs", False

    def __init__(self, lean: LeanPass, recorder: Recorder, strict: bool):
        self.lean, self.graphs = lean, Graphs(recorder, strict)

    def __call__(self, cache: SlotCache, ids: Tensor, positions: Tensor, extent: int) -> tuple[Tensor, Streams]:
        def run(ids: Tensor, positions: Tensor, extent: int) -> tuple[Tensor, ...]:
            logits, streams = self.lean(cache, ids, positions, extent)
            return logits.flatten(0, 1), *streams.flat

        logits, *flat = self.graphs(run, cache, (ids, positions), 1, extent, self.lean.attentions.of)
        return logits.view(*ids.shape, -1), Streams(flat, *ids.shape)


def rows_recorded(rows: int) -> int:
    """To how many rows a pass over `rows` is padded: at most a quarter more, none up to 8."""
    return _stepped(rows, 1)


def extent_recorded(extent: int) -> int:
    """How many entries are read in place of `extent`: at most a quarter more, but no fewer than EXTENT_STEP."""
    return _stepped(extent, EXTENT_STEP)


def _stepped(number: int, least: int) -> int:
    step = max(least, 1 << max(0, (number - 1).bit_length() - 3))
    return -(-number // step) * step
