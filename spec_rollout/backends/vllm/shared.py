"""One server for several trainer ranks: rank 0 speaks for all, and all hear what it heard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from spec_rollout.backends.vllm.engine import PolicyWeights
from spec_rollout.backends.vllm.handover import shapes_of
from spec_rollout.backends.vllm.server import Server
from spec_rollout.backends.vllm.steps import ServedSteps
from spec_rollout.records import Completion, SamplingParams, StepStats

TOLD = (RuntimeError, ValueError, OSError)
"""What rank 0 may run into that the other ranks have to know: they would wait for it in vain."""


class Asked(NamedTuple):
    """A rank's rows: as `VLLMEngine.generate` takes them."""

    prompts: list[Sequence[int]]
    limits: list[int]
    keys: list[tuple[int, int]]


class SharedServer(ServedSteps):
    """A `VLLMEngine` on each rank, in front of one `Server` that rank 0 alone talks to. All ranks call every method
    together; what rank 0 is told, or what it raises, every rank returns or raises.

    The server's counters are of all ranks' rows together, so each rank is given the same records of steps: sums over
    the ranks then have the right ratios.

    Args:
        connect: makes the server's client, on rank 0.
        policy: the live policy, gathered tensor by tensor: all ranks walk through it together.
    """

    def __init__(self, connect: Callable[[], Server], policy: PolicyWeights):
        super().__init__()
        self.policy, self.rank = policy, dist.get_rank()
        self.server: Server | None = None
        self.verification: str | None = None
        self.finished = True
        """Whether every rank that took part in the last `generate` had no rows of its own, and none to come."""

        def start() -> None:
            self.server = connect()

        self._heard(start)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        limits: Sequence[int] | None = None,
        keys: Sequence[tuple[int, int]] | None = None,
    ) -> list[Completion]:
        """This rank's completions. A rank may come with no prompts, until all others do."""
        mine = Asked(list(prompts), list(limits or [params.max_new_tokens] * len(prompts)), list(keys or []))
        everyone: list[Asked] = [None] * dist.get_world_size()
        dist.gather_object(mine, everyone if self.rank == 0 else None)

        def draw() -> tuple[list[Completion], list[StepStats], list[int]]:
            counts = [len(rank.prompts) for rank in everyone]
            if not any(counts):
                return [], [], counts
            prompts = [x for rank in everyone for x in rank.prompts]
            limits, keys = [x for rank in everyone for x in rank.limits], [x for rank in everyone for x in rank.keys]
            drawn = self.server.generate(prompts, params, limits, keys or None)
            return drawn, self.server.take_steps()[0], counts

        drawn, steps, counts = self._heard(draw)
        self.finished = not any(counts)
        for step in steps:
            self._add(step)
        begin = sum(counts[: self.rank])
        return drawn[begin : begin + counts[self.rank]]

    def load(self, draft: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        if self._heard(lambda: self.server.policy_shapes is None):
            shapes = shapes_of(self.policy())
            if self.server is not None:
                self.server.policy_shapes = shapes
        walk = iter(self.policy())
        failure: Exception | None = None
        if self.server is not None:
            try:
                self.server.push(walk, draft, version)
            except TOLD as error:  # it is raised below, on every rank
                failure = error
        for _ in walk:
            pass  # the others gather on until the end, and so does a rank 0 that failed on the way

        def report() -> str | None:
            if failure is not None:
                raise failure
            return self.server.verification

        self.verification = self._heard(report)

    def versions(self) -> list[int]:
        return self._heard(lambda: self.server.versions())

    def draft_probe(self) -> list[dict[str, float]]:
        return self._heard(lambda: self.server.draft_probe())

    def near_ties(self) -> int:
        return self._heard(lambda: self.server.near_ties())

    def _heard(self, ask: Callable[[], Any]) -> Any:
        """What `ask` returns or raises on rank 0, on every rank."""
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = ask()
            except TOLD as error:
                told[1] = error
        dist.broadcast_object_list(told)
        if told[1] is not None:
            raise told[1]
        return told[0]
