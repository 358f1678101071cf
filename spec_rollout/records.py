"""What the parts hand to each other: plain records, and the protocol of what chooses γ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from spec_rollout.config import check_types

FinishReason = Literal["eos", "stop", "length"]


class UnsupportedModelError(ValueError):
    """The policy cannot be decoded on ragged rows; the message names the cause and what to do instead."""


class CacheBoundError(ValueError):
    """A single row does not fit into `max_cache_gib`; the message names both and what to do."""


class RolloutMemoryError(RuntimeError):
    """Memory ran out in a rollout; the message names the option to lower, and what it had taken."""


@dataclass(frozen=True)
class SamplingParams:
    """How every completion of one `generate` call is drawn; the names and meanings are those of transformers.

    Raises:
        ValueError: a value out of its range, naming the value, the bound and the remedy.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    """0 is greedy decoding."""
    top_k: int = 0
    """0 keeps every token."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self):
        if isinstance(self.stop_strings, str):
            raise ValueError(
                f"stop_strings={self.stop_strings!r} is one string, which would be read as its letters: give a "
                "tuple of strings."
            )
        for name in ("eos_token_ids", "stop_strings"):
            if isinstance(getattr(self, name), Sequence) and not isinstance(getattr(self, name), str):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_types(self, SamplingParams)
        bounds = (
            ("stop_strings", all(self.stop_strings), "strings of at least one character, which '' is not"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more, and finite"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]; 1 is off"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]; 0 is off"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0, and finite; 1 is off"),
        )
        for name, holds, bound in bounds:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} is out of range: it must be {bound}.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class Request:
    """One completion to sample. `key` (two 32-bit words) names its noise stream and is unique per completion."""

    index: int
    prompt: Sequence[int]
    key: tuple[int, int]
    max_new_tokens: int


@dataclass
class Completion:
    """One sampled completion.

    `logprobs` are float32 log-probabilities of the emitted tokens under the processed distribution that they were
    drawn from. `num_steps` counts the verify passes that the row took part in, `num_drafted` and `num_accepted` the
    guesses made for it.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0


@dataclass
class StepStats:
    """One pass of the decode loop.

    `accepted[i]` is the number of rows that accepted at least i + 1 guesses, so `rows` (i = 0) or `accepted[i - 1]`
    rows reached position i. `context` is the longest committed row, in tokens. Times are in seconds; the split is
    what the host saw, so on an asynchronous device only their sum is meaningful.
    """

    rows: int
    gamma: int
    context: int
    emitted: int
    accepted: list[int]
    draft_s: float = 0.0
    verify_s: float = 0.0
    host_s: float = 0.0
    sample_s: float = 0.0
    """The part of `host_s` for the choice of γ, noise, sampling and verifying, in which the host waits for a GPU."""

    @property
    def seconds(self) -> float:
        return self.draft_s + self.verify_s + self.host_s


@dataclass
class RolloutStats:
    """Sums over one or several `generate` calls; ratios are taken of sums, never averaged."""

    steps: list[StepStats] = field(default_factory=list)
    seconds: float = 0.0
    """Wall time, prefill included."""
    prefill_s: float = 0.0
    near_ties: int = 0
    """Tokens whose two best candidates lay within rounding and were decided by the canonical pass."""
    ngram_drafted: int = 0
    """Of `drafted`, the guesses that came from earlier rollouts."""
    model_drafted: int = 0
    """Of `drafted`, those of a draft model or of the policy in 8 bit."""
    drafter_failures: int = 0
    """Calls in which the drafter broke, and which went on with plain decoding."""
    lean_steps: int = 0
    """Steps in calls that decoded through the lean pass, compiled or not."""
    compiled_steps: int = 0
    """Steps in calls that decoded through a compiled pass, of whichever kind."""
    preemptions: int = 0
    """Rows that gave way to longer ones, and were read again later."""
    cache_bytes: int = 0
    """Most that slots and kept rows took at one time: keys, values, recurrent states and what the draft keeps for each
    token."""
    prefilled_tokens: int = 0
    """Tokens of prompts, and of rows that gave way, that were read before they could go on."""
    reused_tokens: int = 0
    """Those that were copied instead, from a row that had read them: of the same prompt, of one that begins alike, or
    in an earlier call."""

    @property
    def emitted(self) -> int:
        return sum(s.emitted for s in self.steps)

    @property
    def drafted(self) -> int:
        return sum(s.rows * s.gamma for s in self.steps)

    @property
    def accepted(self) -> int:
        return sum(sum(s.accepted) for s in self.steps)

    @property
    def acceptance_rate(self) -> float:
        """Σ accepted / Σ drafted; 0 when nothing was drafted."""
        return self.accepted / max(1, self.drafted)

    @property
    def mean_acceptance_length(self) -> float:
        """Emitted tokens per row and verify pass, over the passes that carried guesses; 1 when none did."""
        rows = sum(s.rows for s in self.steps if s.gamma)
        return sum(s.emitted for s in self.steps if s.gamma) / rows if rows else 1.0

    @property
    def goodput(self) -> float:
        """Emitted tokens per second of wall time."""
        return self.emitted / self.seconds if self.seconds else 0.0


@dataclass
class RefreshStats:
    """One round of draft training: optimiser steps, mean loss of the round, wall seconds.

    `acceptance` are the expected acceptance rates of the first, second … guess, the overlap of draft and target, on
    rollouts held out of the round, and `acceptance_before` those before it. Both are empty where nothing was trained
    or there was too little to hold out.
    """

    steps: int = 0
    tokens: int = 0
    loss: float = float("nan")
    seconds: float = 0.0
    draft_version: int = 0
    acceptance: list[float] = field(default_factory=list)
    acceptance_before: list[float] = field(default_factory=list)


class Controller(Protocol):
    """Chooses how many tokens to guess."""

    def choose(self, batch_size: int, context: int) -> int:
        """The number of tokens to guess for each of `batch_size` rows whose longest has `context` tokens."""

    def observe(self, stats: StepStats) -> None:
        """What the step really cost and brought."""
