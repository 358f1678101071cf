"""`spec-rollout report`: training runs over their steps, side by side, as one page."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spec_rollout.bench.workload import table, write_json
from spec_rollout.profile.canvas import FIXED, MUTED, OURS, PLAIN, Chart, draw
from spec_rollout.profile.page import number, write_page
from spec_rollout.profile.runs import Run, Series, read_run, speedup, total_speedup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VERSION = 1
"""Of report.json."""
PANELS = (
    ("reward", "Reward", "mean reward", "As the trainer logged it."),
    ("speedup", "Speed-up", "× plain decoding", "Sampling time of plain decoding over ours, draft training charged."),
    ("mean_acceptance_length", "Acceptance length", "tokens per pass", "Tokens per row and pass with guesses."),
    ("num_speculative_tokens", "Tokens guessed", "per step and row", "On average, steps without a guess included."),
    ("seconds", "Sampling time", "seconds", "Of a generation phase, draft training included."),
    ("rank_wait_seconds", "Waiting for the slowest rank", "seconds", "Of a rank, after its own sampling, on average."),
    ("refresh_seconds", "Draft training", "seconds", "Time for training the draft in each phase."),
    (
        "draft_loss",
        "Draft loss",
        "KL divergence",
        "Of the draft from the policy, on the rollouts that it learns from.",
    ),
    (
        "draft_acceptance",
        "Acceptance of the first guess",
        "acceptance rate",
        "On rollouts held out of the draft's training.",
    ),
)
FEW = 4
COLOURS, DASHED = (OURS, PLAIN, *FIXED) * 9, (0, (3, 2))
FLOORS = {"mean_acceptance_length": 1, "num_speculative_tokens": 0, "seconds": 0, "refresh_seconds": 0}
FLOORS |= {"rank_wait_seconds": 0}
FLOORS |= {"draft_loss": 0, "draft_acceptance": 0}
"""Where an axis begins that would otherwise begin at the least value."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        runs = [read_run(folder) for folder in args.runs]
        args.out.mkdir(parents=True, exist_ok=True)
        _tell_apart(runs, args.runs)
        figures, baseline = report_figures(runs)
        write_json(args.out / "report.json", figures)
        charts = report_charts(figures, args.out)
        write_page(args.out / "report.html", "Training report", _meta(runs, baseline), charts, **_page(figures))
    except (OSError, ValueError) as error:
        raise SystemExit(f"spec-rollout report: {error}") from error
    header, rows = _table(figures)
    table(header, rows)
    print(_meta(runs, baseline))
    print(f"Page: {args.out / 'report.html'}")
    return 0


def report_figures(runs: Sequence[Run]) -> tuple[dict, Run | None]:
    """report.json, and the run that speed-ups are measured against: the one that guessed nothing, if there is just
    one such."""
    plain = [run for run in runs if run.plain]
    baseline = plain[0] if len(plain) == 1 and len(runs) > 1 else None
    found = []
    for run in runs:
        series = dict(run.series) | {"seconds": run.seconds}
        if run is not baseline and not run.plain:
            series["speedup"] = speedup(run, baseline)
        found.append(
            {
                "name": run.name,
                "plain": run.plain,
                "steps": max(len(values) for values in series.values()),
                "reward_last": _last(series.get("reward", {})),
                "rollout_seconds": sum(run.series.get("rollout_seconds", {}).values()),
                "refresh_seconds": sum(run.series.get("refresh_seconds", {}).values()),
                "mean_acceptance_length_last": _last(series.get("mean_acceptance_length", {})),
                "speedup": None if run.plain else total_speedup(run, baseline),
                "series": {name: {str(step): v for step, v in values.items()} for name, values in series.items()},
            }
        )
    against = None if baseline is None else baseline.name
    return {"version": VERSION, "baseline": against, "runs": found}, baseline


def report_charts(figures: dict, folder: Path) -> list[Chart]:
    """A panel for each series that some run has."""
    charts = []
    names = [run["name"] for run in figures["runs"]]
    styles = {
        name: (colour, DASHED if i % 2 else "-") for i, (name, colour) in enumerate(zip(names, COLOURS, strict=False))
    }
    steps = {int(step) for run in figures["runs"] for values in run["series"].values() for step in values}
    for key, title, label, note in PANELS:
        lines = {
            run["name"]: {int(step): value for step, value in run["series"][key].items()}
            for run in figures["runs"]
            if run["series"].get(key)
        }
        if not lines:
            continue

        def paint(figure: Figure, lines=lines, key=key, label=label) -> None:
            axis = _lines(figure, lines, styles)
            axis.set(xlabel="training step", ylabel=label, xlim=_around(steps))
            axis.set_ylim(bottom=FLOORS.get(key))
            if key == "speedup":
                axis.axhline(1, color=MUTED, linewidth=1)

        charts.append(draw(folder, key, title, note, paint))
    return charts


def _lines(figure: Figure, lines: dict[str, Series], styles: dict[str, tuple]) -> Axes:
    """A line for each run; every other one is dashed, so that one which lies on another does not hide it."""
    axis = figure.add_subplot()
    for name, values in lines.items():
        x, y = list(values), list(values.values())
        colour, style = styles[name]
        size = 2.5 if len(x) > FEW else 5  # a point or two without a line to lead to them are easily missed
        axis.plot(x, y, color=colour, linestyle=style, marker="o", markersize=size, linewidth=1.5, label=name)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if len(lines) > 1:
        figure.legend(loc="outside upper center", ncols=2)
    return axis


def _around(steps: set[int]) -> tuple[float, float]:
    """The same axis for all panels, with a little room."""
    room = max(0.5, 0.04 * (max(steps) - min(steps)))
    return min(steps) - room, max(steps) + room


def _last(values: Series) -> float | None:
    """The mean of the last tenth."""
    found = list(values.values())
    return statistics.mean(found[-max(1, len(found) // 10) :]) if found else None


def _tell_apart(runs: Sequence[Run], folders: Sequence[Path]) -> None:
    """Folders of the same name are called by their whole path."""
    names = [run.name for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if names.count(run.name) > 1:
            run.name = str(folder)


def _meta(runs: Sequence[Run], baseline: Run | None) -> str:
    if baseline is not None:
        return f"Speed-ups are measured against {baseline.name}, which guessed nothing; draft training is charged."
    if any("plain_seconds" in run.series for run in runs):
        return (
            "Speed-ups compare with what plain decoding would have taken by each run's own measured costs; draft "
            "training is charged. A run with num_speculative_tokens: 0 beside them measures it."
        )
    return "For speed-ups, give a run with num_speculative_tokens: 0 beside these, or set profile_rollouts: true."


def _table(figures: dict) -> tuple[tuple[str, ...], list[list]]:
    keys = ("name", "steps", "reward_last", "rollout_seconds", "refresh_seconds", "mean_acceptance_length_last")
    header = ("run", "steps", "reward", "rollouts, s", "draft training, s", "acceptance length", "speed-up")
    return header, [[*(run[key] for key in keys), run["speedup"]] for run in figures["runs"]]


def _page(figures: dict) -> dict:
    header, rows = _table(figures)
    tiles = [
        (f"{number(run['speedup'])}\u00a0×", f"{run['name']}: sampling, draft training charged")
        for run in figures["runs"]
        if run["speedup"]
    ]
    return {"tiles": tiles, "tables": [("The runs", header, rows)]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spec-rollout report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="output directory of a training run")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR")
    return parser
