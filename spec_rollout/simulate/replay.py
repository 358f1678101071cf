"""A recorded rollout decoded once more, on paper: other slots, guesses, ranks and costs, the same completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spec_rollout.backends.trace import RolloutTrace
from spec_rollout.engine.scheduler import Scheduler
from spec_rollout.gamma import AcceptanceModel, CostModel, FixedGamma, GammaController
from spec_rollout.records import Controller, Request, RolloutStats, StepStats


@dataclass(frozen=True)
class Work:
    """Completions to decode: prompt and completion tokens of each, and which share a prompt."""

    prompt_tokens: Sequence[int]
    completion_tokens: Sequence[int]
    group: Sequence[int]

    @classmethod
    def of(cls, trace: RolloutTrace) -> Work:
        return cls(trace.prompt_tokens, trace.completion_tokens, trace.group)

    def resized(self, count: int) -> Work:
        """`count` completions: the first ones, or all of them again and again with prompts of their own."""
        n = len(self.group)
        index = [i % n for i in range(count)]
        groups = [self.group[i % n] + n * (i // n) for i in range(count)]
        return Work([self.prompt_tokens[i] for i in index], [self.completion_tokens[i] for i in index], groups)

    @classmethod
    def joined(cls, parts: Sequence[Work]) -> Work:
        """The completions of several ranks, one rank after the other."""
        starts = np.cumsum([0, *(len(part.group) for part in parts)])
        groups = [int(start) + g for part, start in zip(parts, starts, strict=False) for g in part.group]
        prompts, completions = (
            [n for p in parts for n in getattr(p, name)] for name in ("prompt_tokens", "completion_tokens")
        )
        return cls(prompts, completions, groups)

    def share(self, rank: int, ranks: int) -> Work:
        """The contiguous part that one of `ranks` ranks decodes."""
        n = len(self.group)
        part = slice(rank * n // ranks, (rank + 1) * n // ranks)
        return Work(self.prompt_tokens[part], self.completion_tokens[part], self.group[part])


@dataclass
class Costs:
    """What a rollout's parts cost.

    Attributes:
        steps: seconds of a step.
        prefill_factor: seconds of a prompt pass, in those that `steps` gives for a pass over so many tokens.
        rollout_s: seconds of a rollout besides its steps and prompts.
    """

    steps: CostModel
    prefill_factor: float = 1.0
    rollout_s: float = 0.0

    @classmethod
    def fitted(cls, steps: CostModel, traces: Sequence[RolloutTrace]) -> Costs:
        """`steps` corrected by what every recorded step took, the rest from what the rollouts took besides."""
        costs = cls(CostModel.from_json(steps.to_json()))
        for trace in traces:
            for step in trace.steps:
                costs.steps.observe(step)
        predicted = sum(replay(Work.of(t), costs, t.slots, 0, []).prefill_s for t in traces)
        beside = [t.seconds - t.prefill_s - sum(s.seconds for s in t.steps) for t in traces]
        if predicted:
            costs.prefill_factor = sum(t.prefill_s for t in traces) / predicted
        costs.rollout_s = max(0.0, float(np.median(beside))) if beside else 0.0
        return costs

    def prefill_seconds(self, prompts: Sequence[int]) -> float:
        """Seconds of the passes over `prompts`, each of so many tokens; the last token goes with the first step."""
        widest = max(prompts) - 1
        if widest < 1:
            return 0.0
        return self.prefill_factor * float(self.steps.verify_seconds(len(prompts), [widest])[0])


def acceptance(traces: Sequence[RolloutTrace]) -> AcceptanceModel:
    """What a controller would know of the draft after the rollouts."""
    model = AcceptanceModel()
    for trace in traces:
        for step in trace.steps:
            model.observe(step)
    return model


def position_rates(steps: Sequence[StepStats], gamma: int) -> list[float]:
    """Conditional acceptance of guess 1 … `gamma`: accepted at i of those that reached i; the last known rate goes on.

    Raises:
        ValueError: no step carried a guess.
    """
    reached, accepted = np.zeros(gamma), np.zeros(gamma)
    for step in steps:
        counts = step.accepted[:gamma]
        if counts:
            reached[: len(counts)] += [step.rows, *counts[:-1]]
            accepted[: len(counts)] += counts
    if not reached.any():
        raise ValueError(
            "The trace holds no step with a guess, so nothing is known of the draft: record rollouts in which "
            "speculation ran."
        )
    rates: list[float] = []
    for hits, tries in zip(accepted, reached, strict=True):
        rates.append(hits / tries if tries else rates[-1])
    return rates


class Decoding:
    """One rank's rollout of `work` in flight, in `slots` slots, with guesses that come true at random with conditional
    `rates`.

    Args:
        gamma: guesses per step; None lets a controller choose up to len(rates).
        draft: what that controller knows of the draft beforehand; None lets it find out.

    Attributes:
        stats: the steps with their predicted seconds (all of them in `verify_s`).
        clock: seconds since the ranks began, those without work included.
    """

    def __init__(
        self,
        work: Work,
        costs: Costs,
        slots: int,
        gamma: int | None,
        rates: Sequence[float],
        draft: AcceptanceModel | None = None,
        seed: int = 0,
    ):
        self.costs, self.rates, self._rng = costs, np.asarray(rates), np.random.default_rng(seed)
        self._controller: Controller = FixedGamma(gamma or 0)
        if gamma is None:
            known = AcceptanceModel.from_json(draft.to_json()) if draft else None
            self._controller = GammaController(CostModel.from_json(costs.steps.to_json()), len(rates), known)
        limits = work.completion_tokens
        requests = [Request(i, (group,), (0, 0), limits[i]) for i, group in enumerate(work.group)]
        self.scheduler = Scheduler(requests, slots)
        self.left, self.length = np.array(limits), np.array(work.prompt_tokens) - 1
        self.stats = RolloutStats()
        self.clock = costs.rollout_s

    @property
    def done(self) -> bool:
        return self.scheduler.done

    @property
    def unfinished(self) -> int:
        """Completions that wait or are decoded."""
        return len(self.scheduler.waiting) + len(self.scheduler.active)

    def step(self) -> None:
        """One pass of the decode loop."""
        admission = self.scheduler.admit()
        if admission is not None and admission.fresh:
            prefill_s = self.costs.prefill_seconds([int(self.length[r.index]) + 1 for r in admission.fresh])
            self.stats.prefill_s += prefill_s
            self.clock += prefill_s
        active = np.array([r.index for r in self.scheduler.active])
        context = int(self.length[active].max())
        emitted, step = _step(self._controller, self.costs.steps, self.left[active], context, self.rates, self._rng)
        self.left[active] -= emitted
        self.length[active] += emitted
        self._controller.observe(step)
        self.stats.steps.append(step)
        self.clock += step.seconds
        finished = np.flatnonzero(self.left[active] == 0).tolist()
        if finished:
            self.scheduler.release(finished)

    def rows_to_give(self) -> list[int]:
        """The unfinished rows as another rank should take them: the last ones that wait, then the shortest active."""
        active = sorted((request.index for request in self.scheduler.active), key=lambda row: self.length[row])
        return [*(request.index for request in reversed(self.scheduler.waiting)), *active]

    def give(self, count: int) -> list[tuple[int, int, bool]]:
        """Let go of `count` completions; each is (tokens known, tokens to go, whether it had begun)."""
        rows = self.rows_to_give()[:count]
        active = [slot for slot, request in enumerate(self.scheduler.active) if request.index in rows]
        begun = {self.scheduler.active[slot].index for slot in active} | self.scheduler.known.keys()
        self.scheduler.release(active)
        for _ in range(count - len(active)):
            self.scheduler.waiting.pop()
        return [(int(self.length[row]) + 1, int(self.left[row]), row in begun) for row in rows]

    def take(self, given: Sequence[tuple[int, int, bool]], now: float) -> None:
        """Decode what another rank let go of at `now`, each row read anew."""
        self.clock = max(self.clock, now)
        for known, left, begun in given:
            index = len(self.left)
            self.scheduler.waiting.append(Request(index, (-1 - index,), (0, 0), left))
            if begun:
                self.scheduler.known[index] = known
            self.left, self.length = np.append(self.left, left), np.append(self.length, known - 1)


def replay(
    work: Work,
    costs: Costs,
    slots: int,
    gamma: int | None,
    rates: Sequence[float],
    draft: AcceptanceModel | None = None,
    seed: int = 0,
) -> RolloutStats:
    """Decode `work` to its end; the arguments are those of `Decoding`.

    Returns:
        the steps with their predicted seconds and the whole rollout's.
    """
    decoding = Decoding(work, costs, slots, gamma, rates, draft, seed)
    while not decoding.done:
        decoding.step()
    decoding.stats.seconds = decoding.clock
    return decoding.stats


def _step(
    controller: GammaController | FixedGamma,
    cost: CostModel,
    left: np.ndarray,
    context: int,
    rates: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, StepStats]:
    """Tokens [B] that the rows with `left` [B] tokens to go emit, and the step."""
    gamma = controller.choose(len(left), context)
    hits = rng.random((len(left), gamma)) < rates[:gamma]
    matches = hits.cumprod(1).sum(1)
    emitted = np.minimum(matches + 1, left)
    counts = (np.minimum(matches, emitted)[:, None] > np.arange(gamma)).sum(0).tolist()
    seconds = float(cost.step_seconds(len(left), max(gamma, 1), context)[0][gamma])
    return emitted, StepStats(len(left), gamma, context, int(emitted.sum()), counts, verify_s=seconds)
