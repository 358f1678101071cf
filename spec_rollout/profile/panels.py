"""How each picture of a profile is painted: one function for each, from its part of profile.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spec_rollout.profile.canvas import FIXED, INK, MUTED, OURS, PLAIN, RAMP, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = {
    "verify": PLAIN,
    "draft": OURS,
    "sampling": FIXED[0],
    "host": FIXED[1],
    "prefill": FIXED[2],
    "other": MUTED,
}


NAMES = {"ngrams": "earlier rollouts", "model": "draft model"}
"""What a legend calls a sampler, where that is not its name."""
DASHED = (0, (4, 2))


def _series(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Rows of the throughput by what the legend calls them."""
    series: dict[str, list[dict]] = {}
    for row in rows:
        name = f"γ = {row['gamma']}" if row["sampler"] == "fixed" else NAMES.get(row["sampler"], row["sampler"])
        series.setdefault(name, []).append(row)
    return series


def _colours(names: Sequence[str]) -> dict[str, str]:
    fixed = [name for name in names if name.startswith("γ")]
    own = {"plain": PLAIN, "adaptive": OURS} | dict.fromkeys(NAMES.values(), INK)
    return {name: FIXED[i % len(FIXED)] for i, name in enumerate(fixed)} | own


def _rows_axis(axis: Axes, rows: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(set(rows)), [str(n) for n in sorted(set(rows))])
    axis.minorticks_off()
    axis.set_xlabel("rows in the batch")


def throughput(figure: Figure, rows: list[dict]) -> None:
    axis, series = figure.add_subplot(), _series(rows)
    colours = _colours(list(series))
    for name, points in series.items():
        x = [row["batch_size"] for row in points]
        own = name in ("plain", "adaptive")
        axis.plot(
            x,
            [row["tokens_per_s"] for row in points],
            color=colours[name],
            linewidth=2 if own else 1,
            linestyle=DASHED if name == NAMES["ngrams"] else "-",
            marker="o",
            markersize=4 if own else 2.5,
            label=name,
        )
        if own and all(row["predicted_tokens_per_s"] for row in points):
            predicted = [row["predicted_tokens_per_s"] for row in points]
            axis.plot(
                x, predicted, ":", color=colours[name], marker="o", markersize=7, markerfacecolor="none", linewidth=1.2
            )
    _rows_axis(axis, [row["batch_size"] for row in rows])
    axis.set_ylabel("tokens per second")
    axis.set_ylim(0, None)
    axis.legend(loc="upper left")


def speedup(figure: Figure, rows: list[dict]) -> None:
    axis, series = figure.add_subplot(), _series(rows)
    colours = _colours(list(series))
    axis.axhline(1, color=PLAIN, linewidth=1.5)
    highest: dict[int, float] = {}
    for row in rows:
        highest[row["batch_size"]] = max(highest.get(row["batch_size"], 1.0), row["speedup_vs_plain"])
    for name, points in series.items():
        own = name == "adaptive"
        x, y = [row["batch_size"] for row in points], [row["speedup_vs_plain"] for row in points]
        style = DASHED if name == NAMES["ngrams"] else "-"
        size, width = (4, 2) if own else (2.5, 1)
        axis.plot(x, y, color=colours[name], linestyle=style, marker="o", markersize=size, linewidth=width, label=name)
        if own:
            for a, b in zip(x, y, strict=True):  # above all lines, none of which shall cross it
                place = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
                axis.annotate(f"{b:.2f}", (a, highest[a]), color=OURS, **place)
    _rows_axis(axis, [row["batch_size"] for row in rows])
    axis.set_ylabel("× plain decoding")
    axis.margins(x=0.09, y=0.15)
    figure.legend(loc="outside upper center", ncols=3, columnspacing=1.2)


def gamma_map(figure: Figure, data: dict) -> None:
    from matplotlib.patches import Rectangle

    axis = figure.add_subplot()
    for y, (gammas, speedups) in enumerate(zip(data["gamma"], data["speedup"], strict=True)):
        for x, (gamma, speedup) in enumerate(zip(gammas, speedups, strict=True)):
            colour = RAMP[min(gamma, len(RAMP) - 1)]
            axis.add_patch(Rectangle((x, y), 0.96, 0.94, facecolor=colour))
            axis.text(x + 0.48, y + 0.6, str(gamma), ha="center", va="center", fontweight="bold")
            axis.text(x + 0.48, y + 0.25, f"{speedup:.1f}×", ha="center", va="center", fontsize=7.5)
    axis.set(xlim=(0, len(data["batch_sizes"])), ylim=(0, len(data["contexts"])))
    axis.set_xticks([i + 0.48 for i in range(len(data["batch_sizes"]))], data["batch_sizes"])
    axis.set_yticks([i + 0.47 for i in range(len(data["contexts"]))], data["contexts"])
    axis.set(xlabel="rows in the batch", ylabel="context, tokens")
    axis.grid(False)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def rollout(figure: Figure, data: dict) -> None:
    seconds = data["seconds"]
    rows, guesses, saved = figure.subplots(3, 1, sharex=True, height_ratios=(1.2, 1, 1))
    rows.fill_between(seconds, data["rows"], step="pre", color=SOFT, linewidth=0)
    rows.set(ylim=(0, None), ylabel="active rows")
    right = rows.twinx()
    right.plot(seconds, data["gamma"], drawstyle="steps-pre", color=OURS, linewidth=1.4)
    right.set_ylabel("guessed", color=OURS)
    right.set_ylim(0, max(1, *data["gamma"]) + 0.5)
    right.yaxis.get_major_locator().set_params(integer=True)
    right.grid(False)
    guesses.fill_between(seconds, data["drafted"], step="pre", color=SOFT, linewidth=0, label="guessed")
    guesses.fill_between(seconds, data["accepted"], step="pre", color=OURS, linewidth=0, label="came true")
    guesses.set(ylabel="tokens per step", ylim=(0, 1.4 * max(data["drafted"]) or 1))  # room for the legend
    guesses.legend(loc="upper right", ncols=2)
    saved.plot(seconds, data["saved_s"], color=OURS, linewidth=1.6)
    saved.axhline(0, color=MUTED, linewidth=0.8)
    saved.set(ylabel="saved, s", xlabel="seconds")


def by_position(figure: Figure, data: dict[str, list[dict]]) -> None:
    """Bars for each of `data`: the rates by position of who guesses."""
    axis = figure.add_subplot()
    shown = {name: rows for name, rows in data.items() if rows}
    width = 0.66 if len(shown) == 1 else 0.42
    for i, (name, rows) in enumerate(shown.items()):
        x = [row["position"] + (i - (len(shown) - 1) / 2) * width for row in rows]
        y = [row["rate"] for row in rows]
        axis.bar(x, y, color=(OURS, INK)[i], width=0.94 * width, label=name)
        for a, b in zip(x, y, strict=True):
            axis.text(a, b + 0.02, f"{b:.2f}", ha="center", fontsize=9 if len(shown) == 1 else 7.5)
    longest = max(shown.values(), key=len)
    axis.set(ylim=(0, 1.1), xlabel="guess", ylabel="acceptance rate", xticks=[row["position"] for row in longest])
    axis.grid(axis="x", visible=False)
    if len(shown) > 1:
        figure.legend(loc="outside upper center", ncols=2)


def by_place(figure: Figure, data: list[dict]) -> None:
    axis = figure.add_subplot()
    x = [row["first"] for row in data]
    axis.plot(x, [row["mean_acceptance_length"] for row in data], color=OURS, marker="o", markersize=3)
    axis.set(ylim=(1, None), xlabel="token of the answer", ylabel="tokens per pass")


def by_prompt(figure: Figure, data: list[dict]) -> None:
    axis = figure.add_subplot()
    names = [f"{row['first']}–{row['last']}" for row in data]
    y = [row["mean_acceptance_length"] for row in data]
    axis.bar(range(len(data)), y, color=OURS, width=0.6)
    for i, value in enumerate(y):
        axis.text(i, value + 0.03, f"{value:.2f}", ha="center")
    axis.set_xticks(range(len(data)), names)
    axis.set(xlabel="prompt tokens", ylabel="tokens per pass")
    axis.grid(axis="x", visible=False)
    axis.margins(y=0.15)


def time_split(figure: Figure, data: list[dict]) -> None:
    axis = figure.add_subplot()
    names = [f"{row['sampler']} {row['batch_size']}" for row in data]
    left = [0.0] * len(data)
    for part, colour in PARTS.items():
        widths = [100 * row[part] for row in data]
        axis.barh(names, widths, left=left, color=colour, label=part, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set(xlim=(0, 100), xlabel="% of the rollout")
    figure.legend(loc="outside upper center", ncols=3, columnspacing=1.2, handlelength=1, handletextpad=0.4)


def limits(figure: Figure, data: list[dict]) -> None:
    axis = figure.add_subplot()
    curves = {gamma: [row for row in data if row["gamma"] == gamma] for gamma in {row["gamma"] for row in data}}
    widest = max(curves, key=lambda gamma: (len(curves[gamma]), gamma))  # with the most points
    for gamma, colour in ((0, PLAIN), (widest, OURS)):
        rows = curves.get(gamma, [])
        x = [row["rows"] for row in rows]
        label = f"{gamma + 1} token{'s' * (gamma > 0)} per row"
        axis.plot(x, [1e3 * row["verify_s"] for row in rows], color=colour, marker="o", markersize=4, label=label)
        axis.plot(x, [1e3 * row["limit_s"] for row in rows], ":", color=colour, linewidth=1.6)
        if not widest:
            break
    axis.plot([], [], ":", color=INK, label="limit")
    _rows_axis(axis, [row["rows"] for row in data])
    axis.set(ylabel="ms per pass", yscale="log")
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "125" else "")
    figure.legend(loc="outside upper center", ncols=3)


def memory(figure: Figure, data: dict[str, int]) -> None:
    axis = figure.add_subplot()
    names, sizes = [n.replace("_", " ").replace("kv", "K/V") for n in data], [b / 2**20 for b in data.values()]
    axis.barh(names, sizes, color=PLAIN, height=0.6)
    for i, size in enumerate(sizes):
        text = f"{size:.0f}" if size >= 10 else f"{size:.1f}"
        axis.annotate(text, (size, i), (4, 0), textcoords="offset points", va="center")
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("MiB")
    axis.margins(x=0.15)
