"""`bench --contexts`: what a token costs after prompts of given lengths."""

from __future__ import annotations

import json
import re
from argparse import Namespace

import pytest

from spec_rollout import cli
from spec_rollout.bench import workload
from spec_rollout.bench.contexts import prompt_of, rows_over_contexts
from spec_rollout.bench.peers import Measured, Sampler
from spec_rollout.bench.workload import load_policy
from spec_rollout.records import RolloutStats, StepStats


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(workload, "WARM_UP_PROMPTS", 4)
    monkeypatch.setattr(workload, "WARM_UP_ROUNDS", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_every_sampler_at_every_context(folder, tmp_path, capsys):
    out = tmp_path / "bench.json"
    options = ["--contexts", "16,200", "--batch-sizes", "1,2", "--repeats", "2", "--max-new-tokens", "8"]
    assert cli.main(["bench", "--policy", str(folder), *options, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    engines = ["transformers", "plain", "fixed", "adaptive"]
    assert [(r["batch_size"], r["engine"], r["context"]) for r in rows] == [
        (size, engine, context) for size in (1, 2) for engine in engines for context in (16, 200)
    ]
    assert all(r["ms_per_token"] > 0 and r["prompt_s"] > 0 and r["growth_vs_transformers"] > 0 for r in rows)
    assert {r["gamma"] for r in rows if r["engine"] == "fixed"} == {3}
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert str(out.with_suffix(".png")) in capsys.readouterr().out


def test_a_prompt_has_as_many_tokens_as_it_is_asked_for(folder):
    policy = load_policy(str(folder), "float32", 8)
    for tokens in (1, 50, 5000):
        ids = prompt_of(policy, tokens, 0, "varied")
        assert len(ids) == tokens and max(ids) < policy.model.config.vocab_size
    assert ids != prompt_of(policy, 5000, 1, "varied")


def test_prompts_are_not_in_the_cost(folder):
    """Ours: 3 tokens of two rows in 0.2 s; a step of one row does not count. `generate`: 4 tokens in 0.8 s after its
    first two."""

    def ours(prompts, seed):
        slow = len(prompts[0]) / 100
        steps = [StepStats(2, 1, 9, 3, [1], verify_s=0.2 * slow), StepStats(1, 0, 9, 1, [], verify_s=7.0)]
        return Measured(4, 99.0, RolloutStats(steps), prompt_s=50.0)

    def theirs(prompts, seed):
        return Measured(6, 5.0 + 0.8 * (len(prompts[0]) / 100) ** 0.5, prompt_s=5.0)

    samplers = [Sampler("transformers", None, theirs), Sampler("plain", 0, ours)]
    args = Namespace(contexts=[100, 400], repeats=3, style="varied")
    policy = load_policy(str(folder), "float32", 8)
    short, long, plain, grown = rows_over_contexts(policy, samplers, 2, args)
    assert [row["ms_per_token"] for row in (short, long, plain, grown)] == pytest.approx([200, 400, 200 / 3, 800 / 3])
    assert [row["growth"] for row in (short, long, plain, grown)] == pytest.approx([1, 2, 1, 4])
    assert grown["growth_vs_transformers"] == pytest.approx(2) and grown["speedup_vs_transformers"] == pytest.approx(
        1.5
    )
    assert (short["prompt_s"], plain["prompt_s"], plain["mean_acceptance_length"]) == (5.0, 50.0, 1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--contexts", "100000"],
            "is more than the policy's context of .*: ask for contexts of at most .*max_position",
        ),
        (["--contexts", "64", "--peers", "assisted"], "compares with transformers alone: leave --peers out"),
        (["--contexts", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder, capfd, options, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--policy", str(folder), *options])
    assert stop.value.code == 2 and re.search(message, capfd.readouterr().err)
