"""A replay takes the steps that the engine takes, and costs what the costs say."""

from __future__ import annotations

import json

import pytest

from spec_rollout import cli
from spec_rollout.backends.trace import HEAD, NGRAMS, TraceRecorder
from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.gamma import CostModel, FixedGamma, Measurement
from spec_rollout.records import SamplingParams, StepStats
from spec_rollout.simulate.cost_file import Limits, costs_to_json, read_costs
from spec_rollout.simulate.replay import Costs, Work, position_rates, replay
from tests.tiny import PROMPTS, policy

PARAMS = SamplingParams(max_new_tokens=40, eos_token_ids=(4,))
CELLS = [Measurement("verify", rows, tokens, 64, 0.01 * rows + 0.001 * tokens) for rows in (1, 8) for tokens in (1, 8)]
CELLS += [Measurement("draft", rows, 1, 64, 0.002) for rows in (1, 8)]


def rollout(slots: int, gamma: int, path=None, source: str = HEAD):
    known = RolloutEngine(policy("llama")).generate(PROMPTS, PARAMS)
    engine = RolloutEngine(
        policy("llama"), SpecConfig(max_slots=slots), drafter=OracleDrafter(known), controller=FixedGamma(gamma)
    )
    recorder = engine.recorder = TraceRecorder(slots, path, {"step": gamma})
    recorder.source = source
    engine.generate(PROMPTS, PARAMS)
    return recorder


@pytest.mark.parametrize("slots", [2, 3, 9])
@pytest.mark.parametrize("gamma", [0, 1, 4])
def test_the_steps_are_those_of_the_engine(slots, gamma):
    (trace,) = rollout(slots, gamma).rollouts
    again = replay(Work.of(trace), Costs(CostModel(CELLS)), slots, gamma, [1.0] * gamma)
    assert [(s.rows, s.gamma, s.emitted, s.accepted) for s in again.steps] == [
        (s.rows, s.gamma, s.emitted, s.accepted) for s in trace.steps
    ]
    assert again.emitted == trace.tokens


def test_the_seconds_are_those_of_the_costs():
    costs = Costs(CostModel(CELLS), prefill_factor=2.0, rollout_s=5.0)
    again = replay(Work([9, 9], [3, 3], [0, 0]), costs, 2, 0, [])
    step, prefill = float(costs.steps.verify_seconds(2, [1])[0]), float(costs.steps.verify_seconds(1, [8])[0])
    assert len(again.steps) == 3
    assert again.prefill_s == pytest.approx(2 * prefill)  # one prompt, two completions
    assert again.seconds == pytest.approx(5 + 2 * prefill + 3 * step)


def test_guesses_come_true_at_the_given_rates():
    rates = [0.9, 0.5]
    again = replay(Work([5] * 64, [200] * 64, range(64)), Costs(CostModel(CELLS)), 64, 2, rates)
    assert position_rates(again.steps, 2) == pytest.approx(rates, abs=0.02)


def test_the_controller_guesses_where_it_pays():
    work, costs = Work([5] * 8, [60] * 8, range(8)), Costs(CostModel(CELLS))
    plain, adaptive = (replay(work, costs, 8, gamma, [0.9] * 7) for gamma in (0, None))
    hopeless = replay(work, costs, 8, None, [0.0] * 7)
    assert adaptive.seconds < 0.6 * plain.seconds and adaptive.mean_acceptance_length > 2
    assert hopeless.seconds < 1.2 * plain.seconds


def test_a_fit_explains_the_rollouts_that_it_was_made_of():
    trace = rollout(4, 2).rollouts[0]
    for step in trace.steps:
        step.draft_s, step.verify_s, step.sample_s, step.host_s = 0.0, 0.03 * step.rows, 0.0, 0.0
    trace.prefill_s, trace.seconds = 0.7, 0.7 + sum(s.seconds for s in trace.steps) + 0.2
    costs = Costs.fitted(CostModel(CELLS), [trace])
    again = replay(Work.of(trace), costs, 4, 2, [1.0, 1.0])
    assert costs.rollout_s == pytest.approx(0.2) and again.prefill_s == pytest.approx(0.7)
    assert again.seconds == pytest.approx(trace.seconds, rel=0.15)


def test_positions_without_a_guess_take_the_rate_before():
    steps = [StepStats(4, 2, 9, 7, [2, 1]), StepStats(2, 1, 9, 3, [1])]
    assert position_rates(steps, 4) == pytest.approx([0.5, 0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="no step with a guess"):
        position_rates([StepStats(4, 0, 9, 4, [])], 2)


def test_work_grows_by_prompts_of_its_own_and_is_shared_out():
    work = Work([3, 3, 5], [10, 20, 30], [0, 0, 2]).resized(7)
    assert work.completion_tokens == [10, 20, 30, 10, 20, 30, 10] and work.group == [0, 0, 2, 3, 3, 5, 6]
    assert [len(work.share(rank, 3).group) for rank in range(3)] == [2, 2, 3]


def test_costs_survive_a_file(tmp_path):
    costs, path = Costs(CostModel(CELLS), 1.5, 0.25), tmp_path / "cost.json"
    path.write_text(json.dumps(costs_to_json(costs)))
    found = read_costs(path)
    assert (found.prefill_factor, found.rollout_s) == (1.5, 0.25)
    assert found.steps.to_json() == costs.steps.to_json()


def test_limits_are_bandwidth_or_arithmetic():
    limits = Limits(1e9, 1e8, kv_bytes_per_token=1e5, bandwidth=1e12, flops=1e14)
    assert limits.pass_seconds(1e9, 1, 1) == pytest.approx(2e9 / 1e12)
    assert limits.pass_seconds(1e9, 1, 1, 1000) == pytest.approx((2e9 + 1e8) / 1e12)
    assert limits.pass_seconds(1e9, 256, 8) == pytest.approx(2e9 * 2048 / 1e14)
    seconds = limits.cost_model().step_seconds(1, 3, 128)[0]
    assert seconds[0] == pytest.approx(limits.pass_seconds(1e9, 1, 1, 128), rel=0.1)


@pytest.fixture
def trace_file(tmp_path):
    path = tmp_path / "trace.jsonl"
    for gamma in (2, 0):
        recorder = rollout(4, gamma, path)
    recorder.cost(CostModel(CELLS))
    return path


def test_the_command_predicts_every_setting(trace_file, tmp_path, capsys):
    out = tmp_path / "out.json"
    line = f"simulate --trace {trace_file} --slots 2,4 --batch-sizes 7,28 --ranks 1,2 --json {out}"
    assert cli.main(line.split()) == 0
    found = json.loads(out.read_text())["predictions"]
    assert [(p["slots"], p["batch_size"], p["ranks"]) for p in found] == [
        (s, b, r) for s in (2, 4) for b in (7, 28) for r in (1, 2)
    ]
    assert all(p["speculative_s"] > 0 and p["plain_s"] > 0 for p in found)
    assert found[1]["plain_s"] < found[0]["plain_s"] < found[2]["plain_s"]  # two ranks, one rank, four times the work
    assert "speed-up" in capsys.readouterr().out


def test_other_costs_give_other_seconds(trace_file, tmp_path):
    limits = {
        "parameters": 8e9,
        "draft_parameters": 4e8,
        "kv_bytes_per_token": 1.3e5,
        "bandwidth": 3e12,
        "flops": 9e14,
    }
    cost, out = tmp_path / "limits.json", tmp_path / "out.json"
    cost.write_text(json.dumps({"version": 1, "limits": limits}))
    cli.main(f"simulate --trace {trace_file} --cost {cost} --json {out}".split())
    (found,) = json.loads(out.read_text())["predictions"]
    assert found["speedup"] > 1.5  # a large model that reads its weights for few rows


def test_guesses_from_earlier_rollouts_are_replayed_with_costs_of_their_own(trace_file, tmp_path, capsys):
    path, out = tmp_path / "both.jsonl", tmp_path / "out.json"
    recorder = rollout(4, 3, path, NGRAMS)
    recorder.cost(CostModel([c for c in CELLS if c.kind == "verify"]), NGRAMS)
    path.write_text(path.read_text() + trace_file.read_text())

    def seconds(source: str) -> float:
        assert cli.main(f"simulate --trace {path} --slots 4 --json {out}{source}".split()) == 0
        return json.loads(out.read_text())

    by_default = seconds("")
    assert by_default["source"] == HEAD and by_default == seconds(" --source head")
    table = seconds(" --source ngrams")
    assert table["source"] == NGRAMS and table["predictions"][0]["speculative_s"] > 0
    assert table["predictions"] != by_default["predictions"]
    assert "with guesses from earlier rollouts" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds no calibrated costs of guesses from earlier rollouts"):
        cli.main(["simulate", "--trace", str(trace_file), "--source", "ngrams"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--trace none.jsonl", "none.jsonl"),
        ("--trace {0} --cost none.json", "none.json holds no costs"),
        ("--trace {0} --cost {0}", "holds no costs"),
        ("--trace empty.jsonl", "holds no rollout"),
    ],
)
def test_files_that_are_none_are_one_clear_line(trace_file, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(SystemExit, match=message):
        cli.main(["simulate", *options.format(trace_file).split()])
