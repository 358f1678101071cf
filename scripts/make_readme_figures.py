"""For maintainers: tables and pictures of the README and the docs from the JSON files in benchmarks/.

python scripts/make_readme_figures.py            # rewrites what stands between the markers, and the pictures
python scripts/make_readme_figures.py --check    # writes nothing; exit status 1 if a page says something else
"""

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

from spec_rollout.profile.charts import profile_charts

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


def measured(name: str) -> dict:
    return json.loads((BENCHMARKS / name).read_text(encoding="utf-8"))


def on(figures: dict) -> str:
    """Device, threads, dtype, date and commit of a file."""
    hardware, setup = figures["hardware"], figures["setup"]
    threads = f"{hardware['threads']} thread{'s' * (hardware['threads'] > 1)}"
    return (
        f"{threads} of an {hardware['device'].replace('(R)', '')}, {setup['dtype']}, "
        f"torch {hardware['torch']}, {setup['date']}, commit {setup['commit']}: `{setup['command']}`"
    )


def markdown(header: list[str], rows: list[list]) -> str:
    """A table of numbers: two decimals below 10, whole above, a dash for None."""

    def cell(number: float | None) -> str:
        if number is None:
            return "–"
        return f"{number:.2f}" if isinstance(number, float) and number < 10 else f"{number:.0f}"

    cells = [[cell(number) for number in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (header, *cells)]
    return "\n".join([lines[0], "|" + "---:|" * len(header), *lines[1:]])


PEERS = {
    "transformers": "TRL's default, `generate`",
    "transformers_cb": "transformers, continuous batching",
    "assisted": "transformers, prompt lookup",
    "plain": "ours without guessing",
    "adaptive": "**ours**",
}


def bench() -> str:
    """Tokens per second by batch size, against transformers' ways to sample and plain decoding."""
    figures = measured("cpu-small-bench.json")
    rows = []
    for size in sorted({row["batch_size"] for row in figures["rows"]}):
        of_size = [row for row in figures["rows"] if row["batch_size"] == size]
        by = {row["engine"]: row for row in of_size if row["verification"] != "rejection"}
        speeds = [by[name]["tokens_per_s"] if name in by else None for name in PEERS]
        ratios = [by["adaptive"][f"speedup_vs_{name}"] for name in ("transformers", "plain")]
        rows.append([size, *speeds, *ratios])
    header = ["rows", *PEERS.values(), "ours / TRL's default", "ours / without guessing"]
    return f"{markdown(header, rows)}\n\n{on(figures)}"


def demo() -> str:
    """What `make demo` came to."""
    figures = measured("cpu-demo.json")
    setup, hardware = figures["setup"], figures["hardware"]
    same = "" if figures["identical_completions"] and figures["identical_weights"] else "NOT "
    first, last = figures["heldout_accuracy_first"], figures["heldout_accuracy_last"]
    names = ("rollout_speedup", "rollout_speedup_vs_plain", "step_speedup", "step_speedup_vs_plain")
    trl, plain, step, plain_step = (spread([run[name] for run in figures["runs"]]) for name in names)
    times = " and ".join(map(str, sorted(setup["minutes"])))
    where = f"{hardware['threads']} cores of an {hardware['device']} ({setup['date']}, commit {setup['commit']})"
    return (
        f"In fresh clones it took {times} minutes with the install, on {where}. In\n"
        f"{len(figures['runs'])} runs sampling was {trl} times as fast as TRL's own and {plain} times as fast as "
        "ours\n"
        f"without guessing, the draft's training counted; whole steps {step} and {plain_step} times. All\n"
        f"{figures['tokens']} tokens and the final weights were {same}the same. The model solved {first:.0%} of new "
        f"problems before, {last:.0%} after."
    )


def spread(values: list[float]) -> str:
    """The median, and the least and largest."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def simulation() -> str:
    """How far replays are off: of the head's guesses, and of either source on a machine that other jobs shared."""
    return "\n\n".join(
        replays(measured(name)) for name in ("cpu-small-simulate.json", "cpu-small-simulate-ngrams.json")
    )


def replays(figures: dict) -> str:
    """One such table."""
    guessed = {0: "0 (plain)", None: "adaptive"}
    whose = {"plain": "–", "head": "the head's", "ngrams": "from earlier rollouts"}
    lines = ["| slots | guesses | whose | predicted / measured seconds | steps |", "|---:|---:|---|---:|---:|"]
    for row in figures["settings"]:
        cells = row["slots"], guessed.get(row["gamma"], row["gamma"]), whose[row["source"]]
        steps = f"{row['steps_ratio']:.2f}" if "steps_ratio" in row else "–"
        lines.append(f"| {' | '.join(map(str, cells))} | {row['ratio']:.2f} | {steps} |")
    share = figures["recording"]["recorder_share"]
    return "\n".join(lines) + f"\n\nRecording takes {share:.2%} of a rollout.\n\n{on(figures)}"


def hybrid_bench() -> str:
    """Tokens per second of the hybrid reference policy with its MTP head."""
    figures = measured("cpu-hybrid-bench.json")
    header = ["rows", "`generate`", "ours without guessing", "3 guesses", "**ours**", "acceptance length"]
    rows = []
    for size in sorted({row["batch_size"] for row in figures["rows"]}):
        by = {row["engine"]: row for row in figures["rows"] if row["batch_size"] == size}
        own = by["adaptive"]
        speeds = [by[name]["tokens_per_s"] for name in ("transformers", "plain", "fixed", "adaptive")]
        rows.append([size, *speeds, own["mean_acceptance_length"], own["speedup_vs_plain"]])
        rows[-1].append(own["speedup_vs_transformers"])
    return f"{markdown([*header, 'ours / without guessing', 'ours / `generate`'], rows)}\n\n{on(figures)}"


ROLLOUTS = (1, 2, 5, 10, 20)


def hybrid_drafts() -> str:
    """What each kind of draft brought in the rollouts of one GRPO run of that policy."""
    figures = measured("cpu-hybrid-drafts.json")
    names = {"none": "none", "mtp": "the MTP head", "eagle3": "an EAGLE-3 head, cold", "ngrams": "earlier rollouts"}
    header = ["draft", *(f"tokens/s, {n}" for n in ROLLOUTS), *(f"length, {n}" for n in ROLLOUTS), "seconds of all 20"]
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    for name, draft in figures["drafts"].items():
        speeds = [f"{draft['tokens_per_s'][n - 1]:.0f}" for n in ROLLOUTS]
        lengths = [f"{draft['acceptance_length'][n - 1]:.2f}" for n in ROLLOUTS]
        cells = [names[name], *speeds, *lengths, f"{draft['rollout_seconds']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    same = "" if all(all(held.values()) for held in figures["identical"].values()) else "NOT "
    told = f"All {figures['tokens']} tokens and the final weights of the four runs were {same}the same."
    return "\n".join(lines) + f"\n\n{told}\n\n{on(figures)}"


def contexts() -> str:
    """What a token costs over the context, beside `generate`."""
    figures = measured("cpu-small-contexts.json")
    names = {"transformers": "`generate`", "plain": "ours without guessing", "fixed": "ours, {} guesses"}
    lines = ["| | context | ms per token | × first context | growth / `generate`'s | acceptance length | prompt, s |"]
    lines.append("|---|" + "---:|" * 6)
    for row in figures["rows"]:
        length = "–" if row["mean_acceptance_length"] is None else f"{row['mean_acceptance_length']:.2f}"
        cells = [f"{row[key]:.2f}" for key in ("ms_per_token", "growth", "growth_vs_transformers")]
        cells += [length, f"{row['prompt_s']:.1f}"]
        lines.append(f"| {names[row['engine']].format(row['gamma'])} | {row['context']} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n{on(figures)}"


TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "demo": (ROOT / "README.md", demo),
    "bench": (ROOT / "README.md", bench),
    "hybrid bench": (ROOT / "docs" / "hybrids.md", hybrid_bench),
    "hybrid drafts": (ROOT / "docs" / "hybrids.md", hybrid_drafts),
    "contexts": (ROOT / "docs" / "speed.md", contexts),
    "simulation": (ROOT / "docs" / "profile.md", simulation),
}
"""By marker: the page it is on, and what makes it."""


PICTURES = ("throughput", "gamma_map", "rollout")


def draw_pictures() -> None:
    """Three of the profile's pictures, as benchmarks/cpu-small-profile-NAME.png."""
    with tempfile.TemporaryDirectory() as folder:
        profile_charts(measured("cpu-small-profile.json"), Path(folder))
        for name in PICTURES:
            shutil.copy(Path(folder, f"{name}.png"), BENCHMARKS / f"cpu-small-profile-{name}.png")


def filled(name: str, text: str, made: str) -> str:
    """`text` with what stands between the markers of `name` replaced.

    Raises:
        SystemExit: the markers are not there.
    """
    begin, end = f"<!-- {name}: made by scripts/make_readme_figures.py -->", f"<!-- /{name} -->"
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise SystemExit(f"{begin} and {end} must stand once, in this order, around the place of the table.")
    return pattern.sub(lambda _: f"{begin}\n{made}\n{end}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page differs")
    args = parser.parse_args()
    stale = []
    for name, (page, make) in TABLES.items():
        text = page.read_text(encoding="utf-8")
        made = filled(name, text, make())
        if made != text:
            stale.append(page.name)
            if not args.check:
                page.write_text(made, encoding="utf-8")
    if not args.check:
        draw_pictures()
    print(f"{', '.join(stale) or 'nothing'} {'differs' if args.check else 'rewritten'}")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
