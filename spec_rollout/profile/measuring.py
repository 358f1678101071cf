"""Real rollouts of a policy by several samplers, turn by turn, within a time that is given beforehand."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.backends.trace import HEAD, MODEL, NGRAMS, TraceRecorder
from spec_rollout.bench.workload import Policy, warm_up
from spec_rollout.config import SpecConfig
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.protocols import Drafter
from spec_rollout.gamma import CostModel, FixedGamma, GammaController
from spec_rollout.records import RolloutStats

WIDEST = SpecConfig().max_num_speculative_tokens
WARM_UP_SHARE, WARM_UP_ROUNDS = 0.3, 5
"""Of the time, and rollouts, for a draft that has to learn first."""
LEAST_PROMPTS = 4
"""Completions of a small batch size in one turn."""
WARM_TOKENS = 8


class OutOfTime(Exception):
    """The time that was given is over."""


class Timed(TraceRecorder):
    """Ends the rollout in flight when time is up."""

    def __init__(self, slots: int, path: Path | None, deadline: float):
        super().__init__(slots, path)
        self.deadline = deadline

    def step(self, rows, emitted, gamma):
        super().step(rows, emitted, gamma)
        if time.perf_counter() > self.deadline:
            raise OutOfTime


@dataclass(frozen=True)
class Sampler:
    """`gamma` guesses per step; None is the adaptive number."""

    name: str
    gamma: int | None

    @property
    def source(self) -> str:
        """Who guesses."""
        return self.name if self.name in (NGRAMS, MODEL) else HEAD

    @property
    def labels(self) -> dict:
        return {"sampler": self.name, "gamma": self.gamma}


def batches(prompts: Sequence[list[int]], size: int, seed: int) -> list[list[list[int]]]:
    """At least LEAST_PROMPTS prompts, drawn at random, in batches of `size`; all prompts are drawn before one is drawn
    again."""
    wanted = size * -(-LEAST_PROMPTS // size)
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(prompts)) for _ in range(-(-wanted // len(prompts)))])
    return [[prompts[i] for i in order[first : first + size]] for first in range(0, wanted, size)]


def warm_backend(
    policy: Policy, prompts: Sequence[list[int]], config: SpecConfig, deadline: float
) -> tuple[EmbeddedBackend, int]:
    """A backend with the head in `config.draft_model_path`, or with one that learns here for WARM_UP_SHARE of the time
    until `deadline`, and with earlier rollouts to guess from; and the number of those that the head learned from."""
    backend = EmbeddedBackend(policy.model, config, policy.tokenizer)
    backend.engine.recorder = Timed(config.max_slots, None, deadline)
    if not config.draft_refresh:
        backend.generate(batches(prompts, config.max_slots, 1000)[0], policy.params)  # for guesses from it
        backend.engine.recorder = None
        return backend, 0
    enough = time.perf_counter() + WARM_UP_SHARE * (deadline - time.perf_counter())
    turns, learned = [batches(prompts, config.max_slots, 1000 + turn)[0] for turn in range(WARM_UP_ROUNDS)], 0
    for stats in warm_up(backend, turns, policy.params):
        learned += stats.steps > 0
        if time.perf_counter() > enough:
            break
    backend.engine.recorder = None
    return backend, learned


def measured_engine(policy: Policy, backend: EmbeddedBackend, slots: int) -> RolloutEngine:
    """An engine of its own, with room for any number of guesses; the draft learns no more."""
    backend.drafter.collector.buffer = None
    return RolloutEngine(policy.model, SpecConfig(max_slots=slots), drafter=backend.drafter, controller=FixedGamma(0))


class Measuring:
    """Runs every sampler at every batch size, again and again, until the turns or the time are over.

    One engine and one draft serve all of them, so a slow moment of the machine meets all. The adaptive samplers keep
    their controllers throughout, as in training.

    Args:
        drafters: who guesses, by source.
        costs: what steps cost with each of them.
    """

    def __init__(
        self,
        policy: Policy,
        engine: RolloutEngine,
        drafters: dict[str, Drafter],
        costs: dict[str, CostModel],
        recorder: TraceRecorder,
    ):
        self.policy, self.engine, self.recorder, self.drafters = policy, engine, recorder, drafters
        self.costs = costs
        self.controllers = {
            source: GammaController(CostModel.from_json(cost.to_json()), WIDEST) for source, cost in costs.items()
        }

    def samplers(self, gammas: Sequence[int]) -> list[Sampler]:
        """All that are compared."""
        others = [Sampler(source, None) for source in (NGRAMS, MODEL) if source in self.controllers]
        fixed = [Sampler("fixed", gamma) for gamma in gammas]
        return [Sampler("plain", 0), *fixed, *others, Sampler("adaptive", None)]

    def run(self, prompts: Sequence[list[int]], sizes: Sequence[int], gammas: Sequence[int], turns: int) -> None:
        """Record all rollouts; the progress bar counts them.

        Raises:
            OutOfTime: the recorder says so.
        """
        samplers = self.samplers(gammas)
        with tqdm(total=turns * len(sizes) * len(samplers), desc="measuring", unit="run", file=sys.stderr) as bar:
            for size in sizes:
                self._warm(batches(prompts, size, 0)[0])
            for turn, size, sampler in self._plan(sizes, samplers, turns):
                bar.set_postfix_str(f"{sampler.name} at {size}")
                for number, batch in enumerate(batches(prompts, size, turn)):
                    labels = {"batch_size": size, "turn": turn, "batch": number}
                    self.sample(sampler, batch, (turn, number), labels)
                bar.update()

    def sample(self, sampler: Sampler, batch: list[list[int]], seed: tuple[int, ...], labels: dict) -> None:
        """One recorded rollout."""
        self.use(sampler)
        self.recorder.labels, self.recorder.source = sampler.labels | labels, sampler.source
        self.engine.recorder = self.recorder
        self.engine.generate(batch, self.policy.params, seed=seed)
        self.engine.stats = RolloutStats(cache_bytes=self.engine.stats.cache_bytes)

    def use(self, sampler: Sampler) -> None:
        """Decode as `sampler` does from now on."""
        self.engine.drafter = self.drafters[sampler.source] if sampler.gamma != 0 else None
        self.engine.controller = self.controller(sampler)

    def controller(self, sampler: Sampler) -> GammaController | FixedGamma:
        """Who decides for `sampler` how far to guess."""
        return self.controllers[sampler.source] if sampler.gamma is None else FixedGamma(sampler.gamma)

    def _warm(self, batch: list[list[int]]) -> None:
        """A few tokens that do not count: first passes of a new shape are slow."""
        self.engine.recorder = None
        samplers = [Sampler("plain", 0), Sampler("fixed", 3)]
        for sampler in samplers + [Sampler(source, 3) for source in (NGRAMS, MODEL) if source in self.drafters]:
            self.use(sampler)
            self.engine.generate(batch, self.policy.params, max_new_tokens=[WARM_TOKENS] * len(batch))

    @staticmethod
    def _plan(sizes: Sequence[int], samplers: Sequence[Sampler], turns: int) -> Iterator[tuple[int, int, Sampler]]:
        """Every other turn goes through the samplers backwards."""
        for turn in range(turns):
            for size in sizes:
                for sampler in samplers if turn % 2 == 0 else reversed(samplers):
                    yield turn, size, sampler
