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


def replay(
    work: Work,
    costs: Costs,
    slots: int,
    gamma: int | None,
    rates: Sequence[float],
    draft: AcceptanceModel | None = None,
    seed: int = 0,
) -> RolloutStats:
    """Decode `work` in `slots` slots with guesses that come true at random with conditional `rates`.

    Args:
        gamma: guesses per step; None lets the controller choose up to len(rates).
        draft: what the controller knows of the draft beforehand.

    Returns:
        the steps with their predicted seconds (all of them in `verify_s`) and the whole rollout's.
    """
    rng, rates = np.random.default_rng(seed), np.asarray(rates)
    controller: Controller = FixedGamma(gamma or 0)
    if gamma is None:
        known = AcceptanceModel.from_json(draft.to_json()) if draft else None
        controller = GammaController(CostModel.from_json(costs.steps.to_json()), len(rates), known)
    limits = work.completion_tokens
    requests = [Request(i, (group,), (0, 0), limits[i]) for i, group in enumerate(work.group)]
    scheduler = Scheduler(requests, min(slots, len(requests)))
    left, length = np.array(limits), np.array(work.prompt_tokens) - 1
    stats, active = RolloutStats(), np.zeros(0, dtype=int)
    while not scheduler.done:
        admission = scheduler.admit()
        if admission is not None:
            active = np.array([r.index for r in scheduler.active])
            if admission.fresh:
                stats.prefill_s += costs.prefill_seconds([work.prompt_tokens[r.index] for r in admission.fresh])
        emitted, step = _step(controller, costs.steps, left[active], int(length[active].max()), rates, rng)
        left[active] -= emitted
        length[active] += emitted
        controller.observe(step)
        stats.steps.append(step)
        finished = np.flatnonzero(left[active] == 0).tolist()
        if finished:
            scheduler.release(finished)
            active = np.array([r.index for r in scheduler.active], dtype=int)
    stats.seconds = costs.rollout_s + stats.prefill_s + sum(s.seconds for s in stats.steps)
    return stats


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
