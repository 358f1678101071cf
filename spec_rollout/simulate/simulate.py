"""`spec-rollout simulate`: recorded rollouts under other slots, batch sizes, ranks and costs."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from spec_rollout.backends.trace import HEAD, MODEL, NGRAMS, RolloutTrace, Trace, joined, read_traces
from spec_rollout.bench.workload import positive, positives, table, write_json
from spec_rollout.config import SpecConfig
from spec_rollout.gamma import CostModel
from spec_rollout.simulate.cost_file import read_costs
from spec_rollout.simulate.replay import Costs, Work, acceptance, position_rates
from spec_rollout.simulate.sharing import Phase, phase

WIDEST = SpecConfig().max_num_speculative_tokens
GUESSES = {
    HEAD: "guesses of the draft head",
    NGRAMS: "guesses from earlier rollouts",
    MODEL: "guesses of a draft model",
}


@dataclass
class Prediction:
    """Seconds of a generation phase, on average over the recorded ones; those of the slowest rank.

    `refresh_s` is what training the draft took where the trace was recorded; `speedup` charges it. `wait_s` is how
    long a rank waits for the slowest on average, `shared_s` what the phase would take if ranks that have finished took
    over unfinished completions; both with guesses, and None of one rank.
    """

    slots: int
    batch_size: int
    ranks: int
    plain_s: float
    speculative_s: float
    refresh_s: float
    tokens: float
    wait_s: float | None = None
    shared_s: float | None = None

    @property
    def speedup(self) -> float:
        return self.plain_s / (self.speculative_s + self.refresh_s)


def predict(
    trace: Trace,
    works: Sequence[Work],
    costs: Costs,
    slots: int,
    batch_size: int | None,
    ranks: int,
    refresh_s: float | None = None,
) -> Prediction:
    """What the recorded rollouts would take.

    Args:
        works: those of a generation phase each, all ranks together.
        slots: of each rank.
        batch_size: completions of a generation phase over all ranks; None keeps the recorded number.
        refresh_s: seconds of draft training per phase; None takes the mean of the trace.
    """
    rates = position_rates([s for t in trace.rollouts for s in t.steps], WIDEST)
    draft = acceptance(trace.rollouts)
    works = [w if batch_size is None else w.resized(batch_size) for w in works]
    shares = [[share for rank in range(ranks) if (share := work.share(rank, ranks)).group] for work in works]

    def phases(gamma: int | None, sharing: bool = False) -> list[Phase]:
        return [phase(parts, costs, slots, gamma, rates, draft, sharing=sharing) for parts in shares]

    adaptive = phases(None)
    if refresh_s is None:
        refresh_s = statistics.mean([r["seconds"] for r in trace.refreshes] or [0.0])
    return Prediction(
        slots,
        batch_size or round(statistics.mean(len(w.group) for w in works)),
        ranks,
        statistics.mean(one.seconds for one in phases(0)),
        statistics.mean(one.seconds for one in adaptive),
        refresh_s,
        statistics.mean(sum(w.completion_tokens) for w in works),
        statistics.mean(one.wait_s for one in adaptive) if ranks > 1 else None,
        statistics.mean(one.seconds for one in phases(None, sharing=True)) if ranks > 1 else None,
    )


def phases_of(ranks: Sequence[Sequence[RolloutTrace]]) -> list[Work]:
    """The completions of each generation phase, from what each rank recorded: rollouts of several ranks with the same
    labels were one phase, and so is each of a single rank."""
    if len(ranks) == 1:
        return [Work.of(rollout) for rollout in ranks[0]]
    found: dict[tuple, list[Work]] = {}
    for rollouts in ranks:
        for rollout in rollouts:
            found.setdefault(tuple(sorted(rollout.labels.items(), key=str)), []).append(Work.of(rollout))
    return [Work.joined(parts) for parts in found.values()]


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


COLUMNS = {
    "slots": "slots",
    "batch_size": "completions",
    "ranks": "ranks",
    "plain_s": "plain, s",
    "speculative_s": "speculative, s",
    "refresh_s": "draft training, s",
    "speedup": "speed-up",
}
OF_RANKS = {
    **{name: COLUMNS[name] for name in ("slots", "batch_size", "ranks", "speculative_s")},
    "wait_s": "a rank waits, s",
    "shared_s": "tail shared, s",
}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        ranks = [read_traces([path]) for path in args.trace]
        trace = joined(ranks)
        if not trace.rollouts:
            raise ValueError(f"{args.trace[0]} holds no rollout: give a trace with at least one.")
        source = args.source or guesser(trace.rollouts)
        costs = own_costs(trace, source) if args.cost is None else read_costs(args.cost, source)
        kept = [guessed_by(rank.rollouts, source)[-args.last :] for rank in ranks if rank.rollouts]
        trace.rollouts, works = [rollout for rank in kept for rollout in rank], phases_of(kept)
        slots = args.slots or [max(t.slots for t in trace.rollouts)]
        grid = list(
            itertools.product(
                slots, args.batch_sizes or [None], args.ranks or [round(len(trace.rollouts) / len(works))]
            )
        )
        found = [predict(trace, works, costs, *setting, args.refresh_seconds) for setting in grid]
    except (OSError, ValueError) as error:
        raise SystemExit(f"spec-rollout simulate: {error}") from error
    _show(COLUMNS, found)
    several = [prediction for prediction in found if prediction.ranks > 1]
    if several:
        _show(OF_RANKS, several)
    recorded = f"{len(trace.rollouts)} recorded rollouts with {GUESSES[source]}"
    print(f"Predicted from {recorded}; seconds are those of the slowest rank.")
    predictions = [asdict(p) | {"speedup": p.speedup} for p in found]
    write_json(args.json, {"version": 1, "source": source, "predictions": predictions})
    return 0


def _show(columns: dict[str, str], found: Sequence[Prediction]) -> None:
    table(list(columns.values()), [[getattr(prediction, name) for name in columns] for prediction in found])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spec-rollout simulate", description=__doc__)
    parser.add_argument(
        "--trace", type=Path, nargs="+", required=True, metavar="FILE", help="recorded rollouts, of one rank each"
    )
    parser.add_argument("--cost", type=Path, metavar="FILE", help="costs; those of the trace otherwise")
    parser.add_argument("--slots", type=positives, metavar="16,64", help="rows decoded at once by each rank")
    parser.add_argument("--batch-sizes", type=positives, metavar="64,512", help="completions per generation phase")
    parser.add_argument("--ranks", type=positives, metavar="1,8", help="as many as there are traces otherwise")
    parser.add_argument("--source", choices=list(GUESSES), help="who guesses; who guessed last otherwise")
    parser.add_argument("--last", type=positive, default=8, metavar="N", help="use the last N rollouts of the trace")
    parser.add_argument(
        "--refresh-seconds", type=float, metavar="S", help="draft training per phase; the trace's mean otherwise"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    return parser
