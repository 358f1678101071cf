"""profile.json: what a measurement found, worked out from its recorded rollouts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from spec_rollout.backends.trace import HEAD, MODEL, NGRAMS, RolloutTrace
from spec_rollout.draft.ngrams import History
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.gamma import AcceptanceModel, CostModel, GammaController
from spec_rollout.profile import figures as worked_out
from spec_rollout.profile.advice import advise
from spec_rollout.profile.figures import Guesses
from spec_rollout.profile.measuring import WIDEST
from spec_rollout.simulate.cost_file import Limits
from spec_rollout.simulate.replay import Costs, acceptance, position_rates

VLLM_LEAVES_OUT = (
    "vLLM does not tell guessing from verifying, how much context a step had, or the guesses of a single completion. "
    "Left out are the map by context, acceptance by place and prompt, the split of the time, the distance to the "
    "device's limit, memory, and guesses from earlier rollouts, which only the embedded engine makes."
)


@dataclass
class Found:
    """What the measurement leaves besides the recorded rollouts; whatever it did not get to is empty.

    Attributes:
        costs: of a step as calibrated, by who guesses.
        history: what guesses from earlier rollouts were made from.
        memory: bytes by what holds them, to be asked once all is decoded.
    """

    rollout_backend: str = "embedded"
    limits: Limits | None = None
    costs: dict[str, CostModel] = field(default_factory=dict)
    engine: RolloutEngine | None = None
    history: History | None = None
    memory: Callable[[], dict[str, int]] | None = None
    draft_rollouts: int = 0
    interrupted: bool = False

    @property
    def embedded(self) -> bool:
        return self.rollout_backend == "embedded"


def profile_figures(found: Found, recorded: Sequence[RolloutTrace]) -> tuple[dict, Costs]:
    """The measured part of profile.json, and the head's costs: the calibration, corrected by every recorded step.

    The throughput is predicted with the controller's own costs, which the adaptive rollouts alone have corrected.
    """
    traces, table, model = ([t for t in recorded if t.source == source] for source in (HEAD, NGRAMS, MODEL))
    adaptive = [t for t in traces if t.labels["sampler"] == "adaptive"]
    costs = Costs.fitted(found.costs[HEAD], traces)
    steps = [s for t in traces for s in t.steps]
    rates = _rates(traces)
    draft = acceptance(adaptive or traces)
    slots, longest = max(t.slots for t in recorded), max((s.context for s in steps), default=1)
    guesses = {
        source: Guesses(Costs.fitted(found.costs[source], own), _rates(of), acceptance(own))
        for source, own, of in ((HEAD, adaptive, traces), (NGRAMS, table, table), (MODEL, model, model))
        if own
    }
    plain = [t for t in recorded if t.labels["sampler"] == "plain"]
    unassisted = costs if found.embedded else Costs.fitted(found.costs[HEAD], plain)
    mapped = any(s.gamma for s in steps) and found.embedded
    last = max(adaptive, key=lambda t: (t.slots, t.labels["turn"]), default=None)
    context = int(statistics.median(s.context for s in steps)) if steps else 0
    figures = {
        "throughput": worked_out.throughput(recorded, guesses),
        "gamma_map": worked_out.gamma_map(costs, draft, WIDEST, slots, longest) if mapped else None,
        "vllm_schedule": vllm_schedule(costs, draft, slots, context),
        "rollout": worked_out.one_rollout(last, unassisted) if last else None,
        "acceptance": worked_out.acceptance(traces, WIDEST),
        "ngrams": _ngrams(found.history, table),
        "time_split": worked_out.time_split(traces) if found.embedded else [],
        "limits": asdict(found.limits)
        | {"passes": worked_out.against_limits(steps, found.limits) if found.embedded else []},
        "memory": found.memory() if found.embedded else {},
        "left_out": None if found.embedded else VLLM_LEAVES_OUT,
    }
    figures["advice"] = advise(figures, traces, costs, rates, draft)
    return figures, costs


def _rates(traces: Sequence[RolloutTrace]) -> list[float]:
    """Acceptance by position; 0 where no step carried a guess."""
    steps = [s for t in traces for s in t.steps]
    return position_rates(steps, WIDEST) if any(s.gamma for s in steps) else [0.0] * WIDEST


def _ngrams(history: History | None, traces: Sequence[RolloutTrace]) -> dict | None:
    """What guesses from earlier rollouts were made from, and how often they came true."""
    if not traces:
        return None
    return {
        "completions": len(history.sequences),
        "tokens": sum(map(len, history.sequences)),
        "table_s": history.seconds,
        "by_position": worked_out.by_position(traces, WIDEST),
    }


def vllm_schedule(costs: Costs, draft: AcceptanceModel, slots: int, context: int) -> dict | None:
    """The controller's table in the form of vLLM's speculative_config; None where guessing never pays."""
    ranges = GammaController(costs.steps, WIDEST, draft).schedule(slots, context)
    if not any(gamma for _, _, gamma in ranges):
        return None
    return {
        "num_speculative_tokens": max(gamma for _, _, gamma in ranges),
        "num_speculative_tokens_per_batch_size": [list(entry) for entry in ranges],
    }
