"""The commands on a random policy: what they print and write, and what they refuse."""

import json
import mmap
from dataclasses import replace
from types import SimpleNamespace

import pytest

from spec_rollout import cli
from spec_rollout.bench import bench, check, memory, workload
from spec_rollout.bench.peers import Measured, Sampler
from spec_rollout.bench.rows import rows_of
from spec_rollout.draft.budget import RefreshBudget
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.experiments import arithmetic_run, demo, drift, probe
from spec_rollout.records import RolloutStats, StepStats
from spec_rollout.tasks.reference_policy import RECIPES


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(workload, "WARM_UP_PROMPTS", 4)
    monkeypatch.setattr(workload, "WARM_UP_ROUNDS", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


CHECK = ["--gammas", "0,2,random", "--batch-sizes", "1,4", "--num-prompts", "6", "--max-new-tokens", "12"]


@pytest.mark.parametrize("drafter", ["head", "ngrams", "random", "oracle"])
def test_check_finds_no_difference(folder, tmp_path, drafter):
    out = tmp_path / "check.json"
    assert cli.main(["check", "--policy", str(folder), *CHECK, "--drafter", drafter, "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["identical"] and figures["tokens"] > 12 and figures["max_logprob_error"] < 1e-4
    assert [(c["gamma"], c["batch_size"]) for c in figures["cases"]] == [
        (0, 1), (0, 4), (2, 1), (2, 4), ("random", 1), ("random", 4),
    ]  # fmt: skip
    if drafter == "oracle":
        assert figures["mean_acceptance_length"] > 2


class Wrong(RolloutEngine):
    """Changes one token of what it decodes speculatively."""

    def generate(self, *args, **kwargs):
        completions = super().generate(*args, **kwargs)
        if self.drafter is not None:
            completions[-1].token_ids[-1] ^= 1
        return completions


def test_check_finds_one_wrong_token(folder, monkeypatch, capsys):
    monkeypatch.setattr(check, "RolloutEngine", Wrong)
    assert check.main(["--policy", str(folder), *CHECK, "--drafter", "oracle"]) == 1
    assert "NOT identical" in capsys.readouterr().out


def test_bench_measures_every_engine_at_every_batch_size(folder, tmp_path, capsys):
    out = tmp_path / "bench.json"
    options = ["--batch-sizes", "1,2", "--fixed-gammas", "1,3", "--repeats", "2", "--num-prompts", "2"]
    options += ["--peers", "transformers,assisted,transformers_cb", "--verification", "coupled,rejection"]
    bench.main(["--policy", str(folder), *options, "--max-new-tokens", "8", "--json", str(out)])
    assert "assisted does not decode 2 rows at once" in capsys.readouterr().err
    figures = json.loads(out.read_text())
    peers, ours = ["transformers", "assisted", "transformers_cb"], ["plain", "fixed", "fixed", "adaptive", "adaptive"]
    wanted = [(e, 1) for e in peers + ours] + [(e, 2) for e in peers[::2] + ours]
    assert [(r["engine"], r["batch_size"]) for r in figures["rows"]] == wanted
    assert {r["gamma"] for r in figures["rows"] if r["engine"] in ours} == {None, 0, 1, 3}
    assert all(r["tokens_per_s"] > 0 and r["peak_memory_gib"] > 0 for r in figures["rows"])
    assert all(0 < r["host_time_share"] < 1 for r in figures["rows"] if r["engine"] in ours)
    adaptive = [r["verification"] for r in figures["rows"] if r["engine"] == "adaptive"]
    assert adaptive == ["coupled", "rejection"] * 2
    assert all((r["cold_regret"] is not None) == (r["engine"] == "adaptive") for r in figures["rows"])
    fixed = [r["regret_vs_best_fixed"] for r in figures["rows"] if r["engine"] in ("plain", "fixed")]
    assert fixed.count(0.0) >= 2  # the best one at each batch size
    assert all(r["speedup_vs_plain"] == 1 for r in figures["rows"] if r["engine"] == "plain")
    assert {"device", "threads", "torch"} <= figures["hardware"].keys() and figures["setup"]["path"] == "lean"


def test_bench_figures():
    """Ratios are taken within a turn, regret is against the best fixed γ, and γ's changes are counted."""
    steps = [StepStats(1, gamma, 9, 1, [], draft_s=1.0, verify_s=2.0, host_s=1.0) for gamma in (2, 2, 0, 2)]
    ours = [Measured(100, s, RolloutStats(steps, seconds=17.0, prefill_s=1.0)) for s in (1.0, 2.0, 4.0)]
    slow = [Measured(m.tokens, 2 * m.seconds, m.stats) for m in ours]
    peer = [Measured(100, 4 * m.seconds, peak_memory_gib=9.0) for m in ours]
    samplers = [
        Sampler(*named, None) for named in (("transformers", None), ("plain", 0), ("fixed", 2), ("adaptive", None))
    ]
    # Of 40 steps the first two are left to find γ's place; of the others every second lost a half.
    losing = SimpleNamespace(regrets=lambda steps: [0.5 * (step.context % 2) for step in steps])
    first = [StepStats(1, 2, context, 1, []) for context in (1, 1, *range(38))]
    samplers[3] = replace(samplers[3], controller=losing, first=first)
    rows = rows_of(1, list(zip(samplers, (peer, slow, ours, slow), strict=True)))
    assert [r["speedup_vs_transformers"] for r in rows] == [1, 2, 4, 2]
    assert [r["regret_vs_best_fixed"] for r in rows] == [0.75, 0.5, 0, 0.5]
    assert rows[3]["gamma_changes_per_100_steps"] == 50 and rows[3]["host_time_share"] == 0.25
    assert [r["cold_regret"] for r in rows] == [None, None, None, 0.25]
    assert rows[0]["host_time_share"] is None and rows[0]["peak_memory_gib"] == 9


def test_the_peak_of_memory_is_of_the_last_reset():
    memory.reset_peak_memory()
    before = memory.peak_memory_gib()
    with mmap.mmap(-1, 2**26) as pages:  # new ones: a tensor may lie where another was freed, which adds nothing
        for _ in range(64):
            pages.write(bytes(2**20))
    assert 0.05 < memory.peak_memory_gib() - before < 0.2
    memory.reset_peak_memory()
    assert memory.peak_memory_gib() - before < 0.05


@pytest.fixture
def short_runs(monkeypatch):
    monkeypatch.setattr(arithmetic_run, "BATCH_SIZE", 8)
    monkeypatch.setattr(arithmetic_run, "COMPLETION_TOKENS", 12)
    monkeypatch.setattr(arithmetic_run, "PROBLEMS", 16)


@pytest.fixture
def short_demo(monkeypatch):
    """Its policy learns for two steps, and its runs are as short."""
    recipe = replace(RECIPES["demo"], num_layers=2, hidden_size=64, num_problems=40, batch_size=8)
    monkeypatch.setitem(RECIPES, "demo", recipe)
    small = {"steps": 3, "batch_size": 8, "completion_tokens": 12, "heldout_problems": 8}
    monkeypatch.setattr(demo, "SHORT", replace(demo.SHORT, **small))
    monkeypatch.setattr(arithmetic_run, "PROBLEMS", 16)


@pytest.mark.usefixtures("short_demo")
def test_demo_makes_a_policy_and_compares_three_runs(tmp_path, capsys):
    out = tmp_path / "demo"
    assert demo.main(["--out", str(out)]) == 0
    figures = json.loads((out / "demo.json").read_text())
    assert figures["steps"] == 3 and figures["identical_completions"] and figures["identical_weights"]
    assert figures["tokens"] > 24 and 0 <= figures["heldout_accuracy_last"] <= 1
    seconds = figures["rollout_seconds"]
    assert figures["rollout_speedup"] == seconds["transformers"] / seconds["speculative"]
    assert figures["rollout_speedup_vs_plain"] == seconds["plain"] / seconds["speculative"]
    assert (out / "demo.png").stat().st_size > 10_000
    assert len((out / "prompts.jsonl").read_text().splitlines()) == 8
    shown = capsys.readouterr()
    assert [line.strip()[:2] for line in shown.out.splitlines()[1:6]] == ["1.", "2.", "3.", "4.", "5."]
    assert "s, once" in shown.out and str(out / "demo.png") in shown.out
    assert "SpecGRPOConfig, SpecGRPOTrainer" in shown.out
    for name in ("training the policy", *demo.SAMPLERS):
        assert f"{name}: 100%" in shown.err
    made = (out / "policy" / "model.safetensors").stat().st_mtime_ns
    assert demo.main(["--out", str(out), "--steps", "1"]) == 0
    shown = capsys.readouterr()
    assert (out / "policy" / "model.safetensors").stat().st_mtime_ns == made
    assert "is there" in shown.out and "training the policy" not in shown.err


@pytest.mark.usefixtures("short_demo")
@pytest.mark.parametrize("wrong", ["completions", "weights"])
def test_demo_fails_where_the_runs_differ(tmp_path, monkeypatch, capsys, wrong):
    train = demo.train

    def spoilt(name, *given, **options):
        run = train(name, *given, **options)
        if name == demo.SAMPLERS[2] and wrong == "weights":
            next(iter(run.weights.values())).add_(1)
        elif name == demo.SAMPLERS[2]:
            run.completions[0][0][0] ^= 1
        return run

    monkeypatch.setattr(demo, "train", spoilt)
    assert demo.main(["--out", str(tmp_path / "demo"), "--steps", "1"]) == 1
    assert "NOT identical" in capsys.readouterr().out


@pytest.mark.usefixtures("short_demo")
def test_demo_refuses_the_policy_of_another_size(folder, tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "policy").symlink_to(folder)
    with pytest.raises(SystemExit, match="holds a policy of another size: remove it"):
        demo.main(["--full", "--out", str(tmp_path / "demo")])


@pytest.mark.usefixtures("short_runs")
def test_drift_follows_five_heads(folder, tmp_path, monkeypatch, capsys):
    for name, size in (("PROBE_PROMPTS", 4), ("CEILING_PROMPTS", 8), ("CEILING_STEPS", 3)):
        monkeypatch.setattr(probe, name, size)
    monkeypatch.setattr(RefreshBudget, "seconds", lambda self, *_: 5.0 * self.overhead)
    line = ["--problems", "1", "--policy", str(folder), "--out", str(tmp_path), "--steps", "4", "--every", "2"]
    assert drift.main(line) == 0
    figures = json.loads((tmp_path / "drift.json").read_text())
    assert figures["setup"]["batch_size"] == 8
    assert figures["steps"] == [1, 2, 4] and len(figures["reward"]) == len(figures["tokens_per_second"]) == 4
    for name in ("frozen", "refreshed", "double", "cold", "ceiling"):
        assert len(figures[name]) == 3 and all(1 <= length <= probe.GAMMA + 1 for length in figures[name])
    assert len(figures["policy_kl"]) == len(figures["probe_reward"]) == 3
    assert 0 < figures["refresh_time_share"] < 1
    assert (tmp_path / "drift.png").stat().st_size > 10_000
    assert "Draft training took" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("check", ["--gammas", "8"], "each must be 0 to 7"),
        ("check", ["--batch-sizes", "0"], "at least 1"),
        ("bench", ["--peers", "sglang"], "unknown peer sglang"),
        ("bench", ["--verification", "typical"], "unknown verification typical"),
        ("bench", ["--repeats", "-1"], "at least 1"),
    ],
)
def test_bad_options_are_refused(command, options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--policy", "nowhere", *options])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_policy_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match="nothing cannot be loaded"):
        cli.main(["check", "--policy", str(tmp_path / "nothing")])
