"""`spec-rollout profile` on a random policy: one consistent set of figures, whatever cuts it short."""

from __future__ import annotations

import json
import re
from html import escape
from itertools import pairwise
from pathlib import Path

import pytest

from spec_rollout import cli
from spec_rollout.backends import calibration
from spec_rollout.backends.trace import RolloutTrace, read_traces
from spec_rollout.gamma import CostModel, Measurement
from spec_rollout.profile import measuring, profile
from spec_rollout.profile.charts import profile_charts
from spec_rollout.profile.page import number
from spec_rollout.profile.panels import NAMES
from spec_rollout.profile.profile_figures import vllm_schedule
from spec_rollout.profile.profile_page import schedule_text
from spec_rollout.records import StepStats
from spec_rollout.simulate.cost_file import read_costs
from spec_rollout.simulate.replay import Costs, acceptance

DOCS = Path(__file__).parents[2] / "docs" / "profile.md"
LINE = "--batch-sizes 1,3 --fixed-gammas 2 --turns 2 --max-new-tokens 12 --seconds 1000000"


@pytest.fixture(autouse=True, scope="module")
def quick(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(measuring, "WARM_UP_ROUNDS", 2)
        patch.setattr(calibration, "REPEATS", 1)
        yield


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "out"
    assert cli.main(["profile", "--policy", str(folder), "--out", str(path), *LINE.split(), "--trace"]) == 0
    return path


@pytest.fixture(scope="module")
def figures(out) -> dict:
    return json.loads((out / "profile.json").read_text())


def test_every_sampler_ran_at_every_batch_size(out, figures):
    assert figures["version"] == profile.VERSION and figures["complete"] and not figures["interrupted"]
    assert [(r["batch_size"], r["sampler"], r["gamma"], r["turns"]) for r in figures["throughput"]] == [
        (b, s, g, 2) for b in (1, 3) for s, g in (("plain", 0), ("fixed", 2), ("ngrams", None), ("adaptive", None))
    ]
    assert all(r["predicted_tokens_per_s"] > 0 and r["tokens_per_s"] > 0 for r in figures["throughput"])
    assert [r["speedup_vs_plain"] for r in figures["throughput"] if r["sampler"] == "plain"] == [1, 1]


def test_the_figures_are_those_of_the_trace(out, figures):
    traces = read_traces([out / "trace.jsonl"]).rollouts
    plain = [t for t in traces if t.labels["sampler"] == "plain" and t.labels["batch_size"] == 3]
    speeds = {}
    for t in plain:
        speeds.setdefault(t.labels["turn"], []).append(t)
    speeds = sorted(sum(t.tokens for t in ts) / sum(t.seconds for t in ts) for ts in speeds.values())
    (row,) = [r for r in figures["throughput"] if r["sampler"] == "plain" and r["batch_size"] == 3]
    assert row["tokens_per_s"] == pytest.approx(sum(speeds) / 2) and row["tokens_per_s_max"] == pytest.approx(
        speeds[-1]
    )
    same = [[t.completion_tokens for t in traces if t.labels["sampler"] == s] for s in ("plain", "adaptive")]
    assert sorted(same[0]) == sorted(same[1])  # the same completions, whoever guesses
    guessing = [s for t in traces if t.source == "head" for s in t.steps if s.gamma]
    first = figures["acceptance"]["by_position"][0]
    assert first["reached"] == sum(s.rows for s in guessing)
    assert first["rate"] == pytest.approx(sum(s.accepted[0] for s in guessing) / first["reached"])


def test_guesses_from_earlier_rollouts_have_figures_of_their_own(out, figures):
    trace = read_traces([out / "trace.jsonl"])
    table = [t for t in trace.rollouts if t.labels["sampler"] == "ngrams"]
    assert table and trace.costs.keys() == {"head", "ngrams"} == {t.source for t in trace.rollouts}
    assert all((t.source == "ngrams") == (t in table) for t in trace.rollouts)
    found = figures["ngrams"]
    assert found["completions"] == 3 * 2 and found["tokens"] > 0  # two rollouts of the largest batch
    for row in found["by_position"]:
        steps = [s for t in table for s in t.steps if len(s.accepted) >= row["position"]]
        assert row["rate"] == pytest.approx(
            sum(s.accepted[row["position"] - 1] for s in steps) / max(1, row["reached"])
        )
    assert read_costs(out / "cost.json", "ngrams").steps.to_json() != read_costs(out / "cost.json").steps.to_json()


def test_parts_add_up(figures):
    for row in figures["time_split"]:
        parts = [row[name] for name in ("prefill", "draft", "verify", "sampling", "host", "other")]
        assert sum(parts) == pytest.approx(1) and min(parts) > -0.01
    rollout = figures["rollout"]
    assert len({len(rollout[name]) for name in ("seconds", "rows", "gamma", "drafted", "accepted", "saved_s")}) == 1
    assert figures["memory"]["weights"] > 0 and figures["memory"]["kv_cache"] > 0


def test_a_schedule_covers_every_number_of_rows_and_is_there_only_where_guessing_pays():
    cells = [Measurement("verify", rows, tokens, 64, 0.01 * rows) for rows in (1, 8) for tokens in (1, 8)]
    cells += [Measurement("draft", rows, 1, 64, 0.001 * rows) for rows in (1, 8)]
    steps = [StepStats(8, 3, 64, 24, [7, 6, 5])] * 50
    found = vllm_schedule(Costs(CostModel(cells)), acceptance([trace_of(steps)]), 8, 64)
    ranges = found["num_speculative_tokens_per_batch_size"]
    assert ranges[0][0] == 1 and ranges[-1][1] == 8 and all(a[1] + 1 == b[0] for a, b in pairwise(ranges))
    assert found["num_speculative_tokens"] == max(gamma for _, _, gamma in ranges) > 0
    assert json.loads(schedule_text(found)) == found
    hopeless = acceptance([trace_of([StepStats(8, 3, 64, 8, [0, 0, 0])] * 50)])
    assert vllm_schedule(Costs(CostModel(cells)), hopeless, 8, 64) is None
    assert "no batch size" in schedule_text(None)


def trace_of(steps: list[StepStats]) -> RolloutTrace:
    return RolloutTrace({}, 8, 1.0, 0.0, [], [], [], [], [], [], steps)


def test_the_page_shows_the_figures_and_asks_nothing_of_the_network(out, figures):
    page = (out / "report.html").read_text()
    shown = re.findall(r"<tr>((?:<td>.*?</td>)+)</tr>", page)
    keys = ("batch_size", "sampler", "gamma", "tokens_per_s", "tokens_per_s_min", "tokens_per_s_max")
    keys += ("predicted_tokens_per_s", "speedup_vs_plain", "mean_acceptance_length", "turns")
    named = [row | {"sampler": NAMES.get(row["sampler"], row["sampler"])} for row in figures["throughput"]]
    assert [re.findall("<td>(.*?)</td>", row) for row in shown] == [
        [number(row[key]) for key in keys] for row in named
    ]
    tiles = re.findall(r'<div class="tile"><b>(.*?)</b>', page)
    adaptive = [row for row in figures["throughput"] if row["sampler"] == "adaptive"]
    assert tiles[:2] == [f"{number(row['speedup_vs_plain'])}\u00a0×" for row in adaptive]
    assert tiles[2] == number(max(row["tokens_per_s"] for row in adaptive))
    bars = [f"{row['rate']:.2f}" for row in figures["acceptance"]["by_position"]]
    assert all(f">{bar}</text>" in page for bar in bars)
    for item in figures["advice"]:
        assert item["figures"] and escape(item["text"]) in page
    assert page.count("<li>") == len(figures["advice"]) >= 3
    assert escape(schedule_text(figures["vllm_schedule"])) in page
    for name in ("throughput", "speedup", "gamma_map", "rollout", "time_split", "limits", "memory"):
        assert (out / f"{name}.png").stat().st_size > 5000 and f'<figure id="{name}"' in page
    assert "prefers-color-scheme: dark" in page and "#1b2733" not in page.split("</style>")[1]
    outside = {url for url in re.findall(r"https?://[^\"'<> ]+", page) if not url.startswith("http://www.w3.org/")}
    assert not outside and "<script" not in page


def test_identifiers_of_the_pictures_do_not_meet(out):
    page = (out / "report.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_costs_and_torch_trace_are_left(out):
    assert read_costs(out / "cost.json").prefill_factor > 0
    assert json.loads((out / "torch_trace.json").read_text())["traceEvents"]


def test_every_figure_is_documented(figures):
    page = DOCS.read_text(encoding="utf-8")
    free = {"advice", "series"}

    def names(value, key=""):
        if isinstance(value, dict):
            for name, inner in value.items():
                yield name
                if key not in free:
                    yield from names(inner, name)
        elif isinstance(value, list) and value and key not in free:
            yield from names(value[0], key)

    assert sorted({name for name in names(figures) if f"`{name}`" not in page}) == []


class Cut:
    """Raises `error` when the rollout number `at` begins."""

    def __init__(self, at: int, error: type[BaseException]):
        self.at, self.error, self.count = at, error, 0

    def __call__(self, measuring, *args):
        self.count += 1
        if self.count > self.at:
            raise self.error
        return self.sample(measuring, *args)

    sample = staticmethod(measuring.Measuring.sample)


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (measuring.OutOfTime, 0)])
@pytest.mark.parametrize("at", [2, 9])
def test_what_was_measured_before_the_end_is_kept(folder, tmp_path, monkeypatch, capsys, error, status, at):
    cut = Cut(at, error)
    monkeypatch.setattr(measuring.Measuring, "sample", lambda *args: cut(*args))
    line = ["profile", "--policy", str(folder), "--out", str(tmp_path), *LINE.split()]
    assert cli.main(line) == status
    figures = json.loads((tmp_path / "profile.json").read_text())
    assert not figures["complete"] and figures["interrupted"] == (status == 130)
    assert len(read_traces([tmp_path / "trace.jsonl"]).rollouts) == at
    assert 'class="warning"' in (tmp_path / "report.html").read_text()
    assert "measured until then" in capsys.readouterr().out


def test_no_rollout_in_time_is_said(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measuring.Timed, "step", Cut(0, measuring.OutOfTime))
    assert cli.main(["profile", "--policy", str(folder), "--out", str(tmp_path), *LINE.split()]) == 1
    assert "give --seconds more than 1000000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--prompts empty.jsonl", "empty.jsonl is empty"),
        ("--draft-model nothing", "nothing"),
        ("--max-new-tokens 100000", "context"),
        ("--out file/below", "--out file/below cannot be written: Not a directory"),
    ],
)
def test_a_users_mistake_is_one_clear_line(folder, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        cli.main(["profile", "--policy", str(folder), *LINE.split(), *options.split()])
    assert message in str(stop.value) and "\n" not in str(stop.value)


def test_a_profile_without_a_guess_still_draws(figures, tmp_path):
    bare = figures | {"gamma_map": None, "rollout": None}
    bare["acceptance"] = {"by_position": [], "by_place": [], "by_prompt_tokens": []}
    names = {chart.name for chart in profile_charts(bare, tmp_path)}
    assert "throughput" in names and not {"gamma_map", "rollout"} & names
