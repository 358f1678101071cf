"""Chooses γ, the number of guessed tokens, by predicted goodput."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from spec_rollout.gamma.acceptance import AcceptanceModel
from spec_rollout.gamma.cost_model import CostModel
from spec_rollout.records import StepStats

MARGIN = 0.01
"""Gain in predicted goodput below which γ stays as it is."""
OTHER_BATCH = 1.25
"""Factor of batch size beyond which γ is chosen afresh, without the margin."""
DWELL = 4
"""Least steps of a choice or a probe while the batch stays alike; the first may pay the draft's catch-up."""
PROBE_SHARE = 0.005
"""Share of the decoding time that probes may lose."""
PURSE = 3.0
"""Steps' worth of time that probes may lose at once: at the start, and saved up later."""
PROBE_SPACING = 64
"""Least steps from one probe to the next, unless the draft is new or the candidate's time was not measured yet."""
UNMEASURED = 0.15
"""Relative error of a predicted time above which it counts as not measured."""
WIDEST_FIRST_PROBE = 3
"""Most guesses of a probe while γ = 0."""
STALE_ROWS = 16.0
"""Rows that older acceptance counts for when a probe asks again, or after the draft has changed."""


class GammaController:
    """γ* = argmax over γ ≥ 0 of b * E[tokens | γ] / seconds(b, γ, context), with hysteresis and probes.

    γ moves when the predicted gain exceeds MARGIN (any gain when it moves to 0, which cannot lose to plain decoding),
    at most every DWELL steps. When the batch size has changed by a factor of OTHER_BATCH, it moves at once and for any
    gain.

    A probe tries another γ for DWELL steps: while γ = 0 a small one, since the draft may have become better; while
    γ > 0 plain decoding if it was not measured near this batch size, lest it is the faster one; then a neighbour or 0,
    if it would win with a time two standard errors below the prediction. Probes are paid from an allowance that starts
    with PURSE steps and earns PROBE_SHARE of the decoding time. One starts when the time that it is predicted to lose
    is covered, or half the purse if that is less, pays what it really loses, and ends when the allowance is spent:
    however wrong the predictions are, probes cost PURSE steps and PROBE_SHARE of the time, and at most one step more.

    Attributes:
        draft_ready: False while there is no trained draft: γ = 0 and no probes.
    """

    def __init__(self, cost: CostModel, max_gamma: int, acceptance: AcceptanceModel | None = None):
        if max_gamma < 0:
            raise ValueError(f"max_gamma={max_gamma} is negative: give 0 for plain decoding or a positive bound.")
        self.cost = cost
        self.acceptance = acceptance or AcceptanceModel()
        self.max_gamma = max_gamma
        self.draft_ready = True
        self._gamma: int | None = None
        self._batch_size = 0  # at which γ was last chosen afresh
        self._tokens: np.ndarray | None = None  # expected per row, [max_gamma + 1]; None after an observation
        self._allowance: float | None = None  # seconds that probes may lose; None before the first step
        self._since_probe = 0  # steps
        self._since_change = 0  # steps
        self._draft_is_new = True
        self._probe_gamma, self._probe_left = 0, 0
        self._reference: tuple[float, float] | None = None  # of the probe in flight: goodput of γ, its own seconds

    def choose(self, batch_size: int, context: int) -> int:
        """The number of tokens to guess for each of `batch_size` rows whose longest has `context` tokens."""
        self._reference = None
        if not self.draft_ready or self.max_gamma == 0:
            self._gamma, self._probe_left = 0, 0
            return 0
        rows = max(batch_size, 1)
        seconds, goodput, error = self._predict(rows, context)
        self._settle(rows, goodput)
        if self._allowance is None:
            self._allowance = PURSE * float(seconds[self._gamma])
        if not self._probe_left:
            self._start_probe(seconds, goodput, error)
        elif self._allowance < 0:
            self._probe_left = 0
        self._since_change += 1
        if not self._probe_left:
            return self._gamma
        self._probe_left -= 1
        self._reference = float(goodput[self._gamma]), float(seconds[self._probe_gamma])
        return self._probe_gamma

    def observe(self, stats: StepStats) -> None:
        """What the step really cost and brought."""
        self.cost.observe(stats)
        self.acceptance.observe(stats)
        self._tokens = None
        if self._allowance is None or not 0 < stats.seconds < math.inf:
            return
        self._since_probe += 1
        self._allowance = min(self._allowance + PROBE_SHARE * stats.seconds, PURSE * stats.seconds)
        if self._reference:
            goodput, predicted = self._reference
            self._allowance -= min(stats.seconds, 2 * predicted) - stats.emitted / goodput
            self._reference = None

    def draft_changed(self) -> None:
        """The draft was refreshed: it may be better or worse, so what is known of it counts less."""
        self.acceptance.reset(STALE_ROWS)
        self._tokens = None
        self._draft_is_new = True

    def regrets(self, steps: Sequence[StepStats]) -> list[float]:
        """For each of `steps` the share of goodput that its γ lost against the best one, by what is known now."""
        goodputs = [self._predict(step.rows, step.context)[1] for step in steps]
        return [float(1 - goodput[step.gamma] / goodput.max()) for goodput, step in zip(goodputs, steps, strict=True)]

    def schedule(self, max_batch_size: int, context: int) -> list[tuple[int, int, int]]:
        """Inclusive (first, last, γ) ranges of batch sizes 1 … max_batch_size: what `choose` would settle on as a
        batch drains, in the shape of vLLM's `num_speculative_tokens_per_batch_size`."""
        ranges: list[tuple[int, int, int]] = []
        for rows in range(max_batch_size, 0, -1):
            goodput = self._predict(rows, context)[1]
            best = int(goodput.argmax()) if self.draft_ready else 0
            if ranges and goodput[best] <= goodput[ranges[-1][2]] * (1 + MARGIN):
                best = ranges[-1][2]
            if ranges and best == ranges[-1][2]:
                ranges[-1] = rows, ranges[-1][1], best
            else:
                ranges.append((rows, rows, best))
        return ranges[::-1]

    def state_dict(self) -> dict:
        """Everything that the next decisions depend on, in plain types."""
        return {
            "cost": self.cost.to_json(),
            "acceptance": self.acceptance.to_json(),
            "draft_ready": self.draft_ready,
            "gamma": self._gamma,
            "batch_size": self._batch_size,
            "allowance": self._allowance,
            "since_probe": self._since_probe,
            "draft_is_new": self._draft_is_new,
            "probe": [self._probe_gamma, self._probe_left],
            "since_change": self._since_change,
            "reference": self._reference and list(self._reference),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()`, with the costs that were measured here; a saved γ above max_gamma becomes
        max_gamma.

        Raises:
            ValueError: the state is not one that this version saves.
        """
        try:
            self.cost = CostModel.from_json(state["cost"]).remeasured(self.cost)
            self.acceptance = AcceptanceModel.from_json(state["acceptance"])
            self.draft_ready = state["draft_ready"]
            self._gamma = None if state["gamma"] is None else min(state["gamma"], self.max_gamma)
            self._batch_size, self._allowance = state["batch_size"], state["allowance"]
            self._since_change, self._since_probe = state["since_change"], state["since_probe"]
            self._draft_is_new = state["draft_is_new"]
            self._probe_gamma, self._probe_left = min(state["probe"][0], self.max_gamma), state["probe"][1]
            self._reference = state["reference"] and tuple(state["reference"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"The saved γ state cannot be read ({error!r}): it is of another version; start without it."
            ) from error
        self._tokens = None

    def _predict(self, rows: int, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Seconds, goodput and relative error of the seconds, each [max_gamma + 1], of a step of `rows` rows."""
        if self._tokens is None:
            self._tokens = self.acceptance.expected_curve(self.max_gamma)
        seconds, error = self.cost.step_seconds(rows, self.max_gamma, context)
        return seconds, rows * self._tokens / seconds, error

    def _settle(self, rows: int, goodput: np.ndarray) -> None:
        """Move γ to the best one if it has earned that."""
        best = int(goodput.argmax())
        margin = 0.0 if best == 0 else MARGIN
        if not self._batch_size / OTHER_BATCH < rows < self._batch_size * OTHER_BATCH:
            margin, self._batch_size = 0.0, rows
        elif self._since_change < DWELL:
            return
        if self._gamma is None or goodput[best] > goodput[self._gamma] * (1 + margin):
            self._gamma, self._since_change = best, 0

    def _start_probe(self, seconds: np.ndarray, goodput: np.ndarray, error: np.ndarray) -> None:
        """Begin a probe if there is something to learn and the allowance covers its price."""
        candidate = self._candidate(goodput, error)
        if candidate is None or self._since_change < DWELL:
            return
        news = error[candidate] > UNMEASURED or (self._gamma == 0 and self._draft_is_new)
        price = DWELL * seconds[candidate] * (1 - goodput[candidate] / goodput[self._gamma])
        affordable = self._allowance >= min(price, PURSE / 2 * seconds[self._gamma])  # it ends when that is spent
        if not affordable or not (news or self._since_probe >= PROBE_SPACING):
            return
        self._probe_gamma, self._probe_left, self._since_probe = candidate, DWELL, 0
        if self._gamma == 0:
            self.acceptance.reset(STALE_ROWS)
            self._draft_is_new = False

    def _candidate(self, goodput: np.ndarray, error: np.ndarray) -> int | None:
        """The γ that a probe should try, if any."""
        if self._gamma == 0:
            return 1 + int(goodput[1 : 1 + WIDEST_FIRST_PROBE].argmax())
        if error[0] > UNMEASURED:
            return 0
        others = [n for n in (0, self._gamma - 1, self._gamma + 1) if n <= self.max_gamma]
        hopes = [goodput[n] * math.exp(2 * error[n]) for n in others]
        return others[int(np.argmax(hopes))] if max(hopes) > goodput[self._gamma] else None


class FixedGamma:
    """Always the same γ; plain decoding while `draft_ready` is False."""

    def __init__(self, gamma: int):
        if gamma < 0:
            raise ValueError(f"gamma={gamma} is negative: give 0 for plain decoding or a positive number.")
        self.gamma = gamma
        self.draft_ready = True

    def choose(self, batch_size: int, context: int) -> int:
        return self.gamma if self.draft_ready else 0

    def observe(self, stats: StepStats) -> None:
        """Nothing to learn."""

    def draft_changed(self) -> None:
        """Nothing depends on the draft."""

    def schedule(self, max_batch_size: int, context: int) -> list[tuple[int, int, int]]:
        """As `GammaController.schedule`: one range."""
        return [(1, max_batch_size, self.choose(max_batch_size, context))]

    def state_dict(self) -> dict:
        return {"draft_ready": self.draft_ready}

    def load_state_dict(self, state: dict) -> None:
        self.draft_ready = state["draft_ready"]
