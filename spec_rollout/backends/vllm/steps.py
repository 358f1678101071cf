"""The seam between vLLM's scheduler and a controller: what each step did, and how far the next one guesses."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from spec_rollout.records import Controller, StepStats

GUESSED, EMITTED = "vllm:spec_decode_num_", "vllm:generation_tokens_total"
"""How the names of a server's counters of guesses begin; the name of that of all tokens."""


@dataclass
class Guesses:
    """Counts by the names that vLLM's own record of a step has."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: list[int]


class Plain:
    """Guesses nothing."""

    def choose(self, batch_size: int, context: int) -> int:
        return 0

    def observe(self, stats: StepStats) -> None:
        """Nothing to learn."""


class ServedSteps:
    """The part of a `VLLMEngine` behind a server that is about its steps: they are told afterwards, so a controller
    sees them and chooses nothing."""

    live_schedule = False

    def __init__(self):
        self.controller: Controller | None = None
        self._steps: list[StepStats] = []

    def control(self, controller: Controller) -> None:
        self.controller = controller

    def take_steps(self) -> tuple[list[StepStats], float]:
        taken, self._steps = self._steps, []
        return taken, 0.0

    def sleep(self) -> None:
        """It has its device to itself."""

    def _account(self, counted: Counter, emitted: int, seconds: float) -> None:
        """One record for the rows that guessed, one for the others: the server does not tell single steps."""
        accepted = [counted[f"accepted_tokens_per_pos_total:{i}"] for i in range(64)]
        guesses = Guesses(
            counted["drafts_total"], counted["draft_tokens_total"], counted["accepted_tokens_total"], accepted
        )
        guessed = min(emitted, guesses.num_drafts + guesses.num_accepted_tokens)
        for size, found in ((guessed, guesses), (emitted - guessed, None)):
            if size:
                step = step_stats(size, found)
                step.verify_s = seconds * size / emitted
                self._add(step)

    def _add(self, step: StepStats) -> None:
        self._steps.append(step)
        if self.controller is not None:
            self.controller.observe(step)


class StepLog:
    """Turns what vLLM reports of each of its steps into `StepStats`, and stands in for its table of batch sizes.

    vLLM guesses at the end of a step for the next one, so a step's time holds the verification of one choice and the
    guessing of the following; they differ only where the choice changes. Steps that read prompts beside decoding say
    nothing about what decoding costs: they count, with no time of their own, but the controller does not see them.

    Attributes:
        controller: asked before each step, told after it.
        limit: vLLM's own bound of the number of guesses.
    """

    def __init__(self, limit: int):
        self.controller: Controller = Plain()
        self.limit = limit
        self.steps: list[StepStats] = []
        self.prefill_s = 0.0
        self._clock = time.perf_counter()

    def begin(self) -> None:
        """A rollout starts now."""
        self._clock = time.perf_counter()

    def take(self) -> tuple[list[StepStats], float]:
        """The steps, and the seconds of those that read prompts, since the last call."""
        taken = self.steps, self.prefill_s
        self.steps, self.prefill_s = [], 0.0
        return taken

    def __getitem__(self, batch_size: int) -> int:
        """As vLLM's scheduler asks its `dynamic_sd_lookup`: tokens to guess for each of `batch_size` rows."""
        return min(self.controller.choose(batch_size, 0), self.limit)

    def record(self, scheduler_stats: Any, iteration_stats: Any, *others: Any, **more: Any) -> None:
        """As vLLM calls its loggers after each step."""
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        begun = len(iteration_stats.time_to_first_tokens_iter) if iteration_stats else 0
        going_on = iteration_stats.num_generation_tokens - begun if iteration_stats else 0
        if begun:
            self.steps.append(step_stats(begun, None))
        if going_on:
            self.steps.append(step_stats(going_on, scheduler_stats.spec_decoding_stats))
        if going_on and not iteration_stats.num_prompt_tokens:
            self.steps[-1].verify_s = seconds
            self.controller.observe(self.steps[-1])
        else:
            self.prefill_s += seconds

    def log(self, *given: Any) -> None:
        """vLLM's loggers print here; this one is silent."""

    record_sleep_state = log_engine_initialized = log


def step_stats(emitted: int, guesses: Any) -> StepStats:
    """A step that emitted so many tokens, from vLLM's counters of its guesses (None: there were none).

    vLLM counts a guess that came true behind the end of a completion as accepted, but does not emit it. It drops
    single guesses at the end of the context; the step's γ is the number that most rows had.
    """
    if not guesses or not guesses.num_draft_tokens:
        return StepStats(rows=emitted, gamma=0, context=0, emitted=emitted, accepted=[])
    gamma = round(guesses.num_draft_tokens / guesses.num_drafts)
    return StepStats(guesses.num_drafts, gamma, 0, emitted, list(guesses.num_accepted_tokens_per_pos[:gamma]))


def counters(text: str) -> Counter:
    """A server's counters of guesses, by the end of their names and the position, and EMITTED, from its /metrics."""
    counts: Counter = Counter()
    for line in text.splitlines():
        if line.startswith((GUESSED, EMITTED)):
            name, value = line.removeprefix(GUESSED).rsplit(" ", 1)
            name, _, labels = name.partition("{")
            place = labels.partition('position="')[2].partition('"')[0]
            counts[f"{name}:{place}" if place else name] += int(float(value))
    return counts
