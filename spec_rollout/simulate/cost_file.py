"""Costs on disk: measured by `spec-rollout profile`, or worked out from what a device and a model can do at most."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from spec_rollout.backends.trace import HEAD, MODEL, NGRAMS
from spec_rollout.gamma import CostModel, Measurement
from spec_rollout.simulate.replay import Costs

VERSION = 1
KEYS = {HEAD: "cost", NGRAMS: "ngram_cost", MODEL: "model_cost"}
"""Of the measured costs, by who guesses."""
ROWS, TOKENS, CONTEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256), (1, 2, 3, 4, 6, 8), (128, 4096)


@dataclass(frozen=True)
class Limits:
    """A device and a model by their data sheets; times that follow from them are bounds, not measurements.

    Attributes:
        parameters, draft_parameters: of the matrices that a token passes through.
        bytes_per_parameter: 2 for bfloat16.
        kv_bytes_per_token: keys and values of one token in all layers.
        bandwidth: bytes per second.
        flops: operations per second.
        launch_s: seconds of a pass that neither explains; a draft pass takes `draft_launch_s`.
    """

    parameters: float
    draft_parameters: float
    kv_bytes_per_token: float
    bandwidth: float
    flops: float
    bytes_per_parameter: float = 2.0
    launch_s: float = 0.0
    draft_launch_s: float = 0.0

    def pass_seconds(self, parameters: float, rows: int, tokens: int, context: int = 0) -> float:
        """The longer of reading weights, keys and values, and of two operations per parameter and token."""
        read = parameters * self.bytes_per_parameter + rows * context * self.kv_bytes_per_token
        return max(read / self.bandwidth, 2 * parameters * rows * tokens / self.flops)

    def cost_model(self) -> CostModel:
        """These times on a grid of rows, tokens and contexts."""
        cells = [
            Measurement("verify", r, t, c, self.pass_seconds(self.parameters, r, t, c) + self.launch_s)
            for r in ROWS
            for t in TOKENS
            for c in CONTEXTS
        ]
        cells += [
            Measurement("draft", r, t, 0, t * (self.pass_seconds(self.draft_parameters, r, 1) + self.draft_launch_s))
            for r in ROWS
            for t in TOKENS
        ]
        return CostModel(cells)


def read_costs(path: Path, source: str = HEAD) -> Costs:
    """Costs of rollouts with the guesses of `source`, from a file in one of the two forms of docs/profile.md. To
    limits, guesses from earlier rollouts are free but for `draft_launch_s`.

    Raises:
        ValueError: it is neither; the message says what is wrong.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["version"] != VERSION:
            raise ValueError(f"it is of version {state['version']}, this is version {VERSION}")
        if "limits" in state:
            free = {"draft_parameters": 0.0} if source == NGRAMS else {}
            return Costs(Limits(**state["limits"] | free).cost_model())
        cost = state[KEYS[source]]
        return Costs(CostModel.from_json(cost), state["prefill_factor"], state["rollout_s"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{path} holds no costs ({type(error).__name__}: {error}): give the cost.json of `spec-rollout profile`, "
            "or the limits of a device as docs/profile.md describes them."
        ) from error


def costs_to_json(costs: Costs, others: dict[str, CostModel] | None = None) -> dict:
    """As `read_costs` takes it: `costs` with the head's guesses, those of `others` by who guesses."""
    state = {
        "version": VERSION,
        "cost": costs.steps.to_json(),
        "prefill_factor": costs.prefill_factor,
        "rollout_s": costs.rollout_s,
    }
    return state | {KEYS[source]: cost.to_json() for source, cost in (others or {}).items() if source != HEAD}
