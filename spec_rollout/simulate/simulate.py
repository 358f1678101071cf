"""`spec-rollout simulate`: recorded rollouts under other slots, batch sizes, ranks and costs."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from spec_rollout.backends.trace import HEAD, MODEL, NGRAMS, RolloutTrace, Trace, read_traces
from spec_rollout.bench.workload import positive, positives, table, write_json
from spec_rollout.config import SpecConfig
from spec_rollout.gamma import CostModel
from spec_rollout.simulate.cost_file import read_costs
from spec_rollout.simulate.replay import Costs, Work, acceptance, position_rates, replay

WIDEST = SpecConfig().max_num_speculative_tokens
GUESSES = {
    HEAD: "guesses of the draft head",
    NGRAMS: "guesses from earlier rollouts",
    MODEL: "guesses of a draft model",
}


@dataclass
class Prediction:
    """Seconds of a generation phase, on average over the recorded ones; those of the slowest rank.

    `refresh_s` is what training the draft took where the trace was recorded; `speedup` charges it.
    """

    slots: int
    batch_size: int
    ranks: int
    plain_s: float
    speculative_s: float
    refresh_s: float
    tokens: float

    @property
    def speedup(self) -> float:
        return self.plain_s / (self.speculative_s + self.refresh_s)


def predict(
    trace: Trace, costs: Costs, slots: int, batch_size: int | None, ranks: int, refresh_s: float | None = None
) -> Prediction:
    """What the recorded rollouts would take.

    Args:
        slots: of each rank.
        batch_size: completions of a generation phase over all ranks; None keeps the recorded number.
        refresh_s: seconds of draft training per phase; None takes the mean of the trace.
    """
    rates = position_rates([s for t in trace.rollouts for s in t.steps], WIDEST)
    draft = acceptance(trace.rollouts)
    works = [Work.of(t) for t in trace.rollouts]
    works = [w if batch_size is None else w.resized(batch_size) for w in works]

    def seconds(work: Work, gamma: int | None) -> float:
        shares = [work.share(rank, ranks) for rank in range(ranks)]
        return max(replay(share, costs, slots, gamma, rates, draft).seconds for share in shares if share.group)

    if refresh_s is None:
        refresh_s = statistics.mean([r["seconds"] for r in trace.refreshes] or [0.0])
    return Prediction(
        slots,
        batch_size or round(statistics.mean(len(w.group) for w in works)),
        ranks,
        statistics.mean(seconds(work, 0) for work in works),
        statistics.mean(seconds(work, None) for work in works),
        refresh_s,
        statistics.mean(sum(w.completion_tokens) for w in works),
    )


def own_costs(trace: Trace, source: str) -> Costs:
    """The costs that a trace itself tells of rollouts with the guesses of `source`.

    Raises:
        ValueError: it holds no calibration.
    """
    if source not in trace.costs:
        raise ValueError(
            f"The trace holds no calibrated costs of {GUESSES[source]} (no speculative rollout got that far): give "
            "them with --cost FILE."
        )
    rollouts = [r for r in trace.rollouts if r.source == source]
    return Costs.fitted(CostModel.from_json(trace.costs[source]), rollouts)


def trained_on(rollouts: list[RolloutTrace], source: str = HEAD) -> list[RolloutTrace]:
    """Without evaluation, and of a profile those alone in which the number of guesses of `source` was adapted."""
    sampler = "adaptive" if source == HEAD else source
    kept = [r for r in rollouts if r.labels.get("mode") != "eval" and r.labels.get("sampler") in (None, sampler)]
    return kept or rollouts


def guesser(rollouts: list[RolloutTrace]) -> str:
    """Who guessed last."""
    guessed = [r.source for r in trained_on(rollouts) if any(step.gamma for step in r.steps)]
    return guessed[-1] if guessed else HEAD


def guessed_by(rollouts: list[RolloutTrace], source: str) -> list[RolloutTrace]:
    """
    Raises:
        ValueError: there are none.
    """
    found = [r for r in trained_on(rollouts, source) if r.source == source]
    if not found:
        raise ValueError(f"No rollout of the trace had {GUESSES[source]}: leave --source out.")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        trace = read_traces(args.trace)
        if not trace.rollouts:
            raise ValueError(f"{args.trace[0]} holds no rollout: give a trace with at least one.")
        source = args.source or guesser(trace.rollouts)
        costs = own_costs(trace, source) if args.cost is None else read_costs(args.cost, source)
        trace.rollouts = guessed_by(trace.rollouts, source)[-args.last :]
        slots = args.slots or [max(t.slots for t in trace.rollouts)]
        grid = list(itertools.product(slots, args.batch_sizes or [None], args.ranks))
        found = [predict(trace, costs, *setting, args.refresh_seconds) for setting in grid]
    except (OSError, ValueError) as error:
        raise SystemExit(f"spec-rollout simulate: {error}") from error
    header = ("slots", "completions", "ranks", "plain, s", "speculative, s", "draft training, s", "speed-up")
    table(
        header,
        [(p.slots, p.batch_size, p.ranks, p.plain_s, p.speculative_s, p.refresh_s, p.speedup) for p in found],
    )
    recorded = f"{len(trace.rollouts)} recorded rollouts with {GUESSES[source]}"
    print(f"Predicted from {recorded}; seconds are those of the slowest rank.")
    predictions = [asdict(p) | {"speedup": p.speedup} for p in found]
    write_json(args.json, {"version": 1, "source": source, "predictions": predictions})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spec-rollout simulate", description=__doc__)
    parser.add_argument("--trace", type=Path, nargs="+", required=True, metavar="FILE", help="recorded rollouts")
    parser.add_argument("--cost", type=Path, metavar="FILE", help="costs; those of the trace otherwise")
    parser.add_argument("--slots", type=positives, metavar="16,64", help="rows decoded at once by each rank")
    parser.add_argument("--batch-sizes", type=positives, metavar="64,512", help="completions per generation phase")
    parser.add_argument("--ranks", type=positives, default=[1], metavar="1,8")
    parser.add_argument("--source", choices=list(GUESSES), help="who guesses; who guessed last otherwise")
    parser.add_argument("--last", type=positive, default=8, metavar="N", help="use the last N rollouts of the trace")
    parser.add_argument(
        "--refresh-seconds", type=float, metavar="S", help="draft training per phase; the trace's mean otherwise"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    return parser
