"""`spec-rollout profile` with a draft that does not learn."""

import json

import pytest

from spec_rollout import cli
from spec_rollout.backends import calibration
from spec_rollout.backends.trace import read_traces
from spec_rollout.gamma import CostModel
from spec_rollout.profile import measuring
from spec_rollout.simulate.cost_file import read_costs

LINE = "--batch-sizes 1,3 --fixed-gammas 2 --turns 1 --max-new-tokens 12 --seconds 1000000"


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measuring, "WARM_UP_ROUNDS", 1)
    monkeypatch.setattr(calibration, "REPEATS", 1)


@pytest.mark.parametrize("draft", ["quantized", "model"])
def test_drafts_that_do_not_learn_have_figures_of_their_own(draft, folder, tmp_path):
    draft = str(folder) if draft == "model" else draft  # the policy as its own draft model
    given = ["--policy", str(folder), "--out", str(tmp_path), "--draft-model", draft]
    assert cli.main(["profile", *given, *LINE.split()]) == 0
    trace = read_traces([tmp_path / "trace.jsonl"])
    assert trace.costs.keys() == {"head", "ngrams", "model"} == {t.source for t in trace.rollouts}
    guessed = [t for t in trace.rollouts if t.source == "model"]
    assert guessed and all(t.labels["sampler"] == "model" for t in guessed)
    kept = read_costs(tmp_path / "cost.json", "model").steps
    assert kept.to_json() == CostModel.from_json(trace.costs["model"]).to_json()
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["complete"] and [r["sampler"] for r in found["throughput"]].count("model") == 2
    assert "draft model" in (tmp_path / "report.html").read_text()
