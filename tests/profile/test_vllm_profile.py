"""`spec-rollout profile --rollout-backend vllm`: a page of what vLLM shows, or one line that says what is missing."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from spec_rollout import cli
from spec_rollout.backends import calibration
from spec_rollout.backends.trace import read_traces
from spec_rollout.profile import measuring
from tests.backends.vllm.tiny import needs_vllm

LINE = "--batch-sizes 1,3 --fixed-gammas 2 --turns 1 --max-new-tokens 12 --seconds 1000000"


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_one_line_says_how_to_get_it(folder, tmp_path):
    with pytest.raises(SystemExit, match="needs vLLM, which is not installed"):
        cli.main(["profile", "--rollout-backend", "vllm", "--policy", str(folder), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@needs_vllm
def test_vllm_is_measured_against_a_vllm_without_a_draft(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setattr(measuring, "WARM_UP_ROUNDS", 2)
    monkeypatch.setattr(calibration, "REPEATS", 1)
    out = tmp_path / "out"
    line = ["profile", "--rollout-backend", "vllm", "--policy", str(folder), "--out", str(out), *LINE.split()]
    assert cli.main(line) == 0
    figures = json.loads((out / "profile.json").read_text())
    assert figures["complete"] and figures["setup"]["rollout_backend"] == "vllm"
    assert [(r["batch_size"], r["sampler"]) for r in figures["throughput"]] == [
        (b, s) for b in (1, 3) for s in ("plain", "fixed", "adaptive")
    ]
    traces = read_traces([out / "trace.jsonl"]).rollouts
    fixed = [s for t in traces if t.labels["sampler"] == "fixed" for s in t.steps if s.rows and s.gamma]
    assert fixed and all(s.gamma <= 2 for s in fixed)
    assert not any(s.gamma for t in traces if t.labels["sampler"] == "plain" for s in t.steps)
    assert all(sum(s.emitted for s in t.steps) == t.tokens for t in traces)
    assert figures["left_out"] in (out / "report.html").read_text().replace("&#x27;", "'")
    assert not figures["memory"] and not figures["time_split"] and figures["gamma_map"] is figures["ngrams"] is None
