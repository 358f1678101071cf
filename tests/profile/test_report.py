"""A training report holds what the logs and traces say, and measures against the plain run."""

from __future__ import annotations

import json

import pytest

from spec_rollout import cli
from spec_rollout.backends.trace import RolloutTrace
from spec_rollout.gamma import CostModel, Measurement
from spec_rollout.profile.runs import read_run, total_speedup
from spec_rollout.records import StepStats


def log(step: int, guessed: float, rollout: float, refresh: float, **more) -> dict:
    metrics = {"num_speculative_tokens": guessed, "rollout_seconds": rollout, "refresh_seconds": refresh, **more}
    return {"step": step, "reward": 0.1 * step} | {f"speculative/{name}": value for name, value in metrics.items()}


def write_state(folder, *entries):
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*entries, {"train_loss": 1.0, "step": 2}]}))
    return folder


@pytest.fixture
def runs(tmp_path):
    plain = write_state(tmp_path / "plain", log(1, 0, 4.0, 0.0), log(2, 0, 6.0, 0.0))
    ours = write_state(tmp_path / "ours", log(1, 0, 4.0, 1.0), log(2, 3.0, 2.0, 1.0, draft_loss=0.5))
    return ours, plain


def test_speed_ups_are_measured_against_the_plain_run_with_training_charged(runs, tmp_path, capsys):
    out = tmp_path / "report"
    assert cli.main(["report", *map(str, runs), "--out", str(out)]) == 0
    figures = json.loads((out / "report.json").read_text())
    ours, plain = figures["runs"]
    assert figures["baseline"] == "plain" and plain["speedup"] is None
    assert ours["series"]["speedup"] == {"1": 4 / 5, "2": 2.0}
    assert ours["speedup"] == pytest.approx(10 / 8) and ours["reward_last"] == pytest.approx(0.2)
    page = (out / "report.html").read_text()
    assert "1.25\u00a0×" in page and "measured against plain" in page
    for name in ("reward", "speedup", "seconds", "draft_loss"):
        assert (out / f"{name}.png").stat().st_size > 5000 and f'id="{name}"' in page
    assert "1.25" in capsys.readouterr().out


def recorded(step: int, seconds: float, guesses: int = 1) -> str:
    """Six tokens in three steps; or in six without guesses."""
    count = 6 // (1 + guesses)
    steps = [StepStats(1, guesses, 8, 1 + guesses, [1] * guesses, verify_s=seconds / count)] * count
    trace = RolloutTrace(
        {"mode": "train", "step": step, "call": 0}, 1, seconds, 0.0, [3], [6], [0], [3], [3], [3], steps
    )
    return json.dumps(trace.to_json())


def test_a_trace_alone_tells_what_plain_decoding_would_have_taken(tmp_path):
    folder = tmp_path / "run" / "rollouts"
    folder.mkdir(parents=True)
    cost = CostModel([Measurement("verify", 1, tokens, 8, 0.1) for tokens in (1, 2)])
    lines = [recorded(0, 0.3), recorded(1, 0.3), recorded(2, 0.63, guesses=0)]
    lines.append(json.dumps({"version": 1, "kind": "cost", "cost": cost.to_json()}))
    lines.append(json.dumps({"version": 1, "kind": "refresh", "labels": {"step": 1}, "seconds": 0.3, "loss": 0.5}))
    (folder / "rank-0.jsonl").write_text("".join(f"{line}\n" for line in lines))
    run = read_run(tmp_path / "run")
    assert run.series["mean_acceptance_length"] == {1: 2.0, 2: 2.0, 3: 1.0}
    assert run.series["draft_loss"] == {2: 0.5}
    assert run.seconds == pytest.approx({1: 0.3, 2: 0.6, 3: 0.63})
    assert run.series["plain_seconds"][3] == 0.63  # what it took: nothing was guessed
    guessed = run.series["plain_seconds"][1]
    assert guessed == run.series["plain_seconds"][2] == pytest.approx(0.6, rel=0.05)  # six steps of about 0.1 s
    assert total_speedup(run, None) == pytest.approx((2 * guessed + 0.63) / 1.53)


def test_ranks_wait_for_the_slowest_one(tmp_path):
    folder = tmp_path / "run" / "rollouts"
    folder.mkdir(parents=True)
    (folder / "rank-0.jsonl").write_text("".join(f"{recorded(step, 1.0)}\n" for step in (0, 1)))
    (folder / "rank-1.jsonl").write_text(
        "".join(f"{recorded(step, seconds)}\n" for step, seconds in ((0, 3.0), (1, 1.0)))
    )
    run = read_run(tmp_path / "run")
    assert run.series["rank_wait_seconds"] == {1: 1.0, 2: 0.0}  # 2 s and none, on average
    assert run.series["rollout_seconds"] == {1: 2.0, 2: 1.0}
    write_state(tmp_path / "logged", log(1, 1, 4.0, 0.0, rank_wait_seconds=0.5))
    assert cli.main(["report", str(tmp_path / "run"), str(tmp_path / "logged"), "--out", str(tmp_path / "out")]) == 0
    assert 'id="rank_wait_seconds"' in (tmp_path / "out" / "report.html").read_text()


def test_the_newest_checkpoint_serves_where_the_run_left_no_state(tmp_path):
    for step in (9, 10):
        write_state(tmp_path / "run" / f"checkpoint-{step}", log(step, 1, 1.0, 0.0))
    assert list(read_run(tmp_path / "run").series["reward"]) == [10]


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [write_state(tmp_path / part / "run", log(1, 1, 1.0, 0.0)) for part in "ab"]
    cli.main(["report", *map(str, folders), "--out", str(tmp_path / "report")])
    figures = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [run["name"] for run in figures["runs"]] == [str(folder) for folder in folders]


@pytest.mark.parametrize(
    ("state", "message"),
    [(None, "has no trainer_state.json"), ("{}", "is no trainer's log"), ('{"log_history": []}', "holds no step yet")],
)
def test_folders_without_a_run_are_one_clear_line(tmp_path, state, message):
    if state is not None:
        (tmp_path / "trainer_state.json").write_text(state)
    with pytest.raises(SystemExit, match=message):
        cli.main(["report", str(tmp_path), "--out", str(tmp_path / "report")])
