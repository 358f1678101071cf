"""vLLM among the samplers of the benchmark."""

import json
import sys

import pytest

from spec_rollout.bench import bench
from spec_rollout.bench.workload import load_policy
from spec_rollout.draft.checkpoint import save_head
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from tests.backends.vllm.tiny import needs_vllm


@needs_vllm
def test_bench_measures_vllm_in_processes_of_its_own(folder, tmp_path):
    shape = HeadConfig.for_target(load_policy(str(folder), "float32", 8).model.config)
    save_head(tmp_path / "head", EagleHead(shape), None, None, {})
    options = ["--batch-sizes", "2,4", "--fixed-gammas", "2", "--repeats", "1", "--num-prompts", "2"]
    options += [
        "--draft",
        str(tmp_path / "head"),
        "--peers",
        "vllm,vllm_eagle",
        "--json",
        str(tmp_path / "bench.json"),
    ]
    options += ["--max-new-tokens", "8", "--json", str(tmp_path / "bench.json")]
    bench.main(["--policy", str(folder), *options])
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    vllm = [row for row in rows if row["engine"].startswith("vllm")]
    wanted = [("vllm", 0), ("vllm_eagle", 0), ("vllm_eagle", 2), ("vllm_eagle", None)]
    assert [(row["engine"], row["gamma"]) for row in vllm] == wanted * 2
    assert all(row["tokens_per_s"] > 0 and row["peak_memory_gib"] > 0 for row in vllm)
    assert all(row["host_time_share"] is None for row in vllm)  # vLLM does not tell
    assert vllm[0]["mean_gamma"] == vllm[1]["mean_gamma"] == 0 and 1 < vllm[2]["mean_gamma"] <= 2


@pytest.mark.parametrize(
    ("python", "message"),
    [("/no/such/python", "--vllm-python /no/such/python is not a Python"), ("bare", "--vllm-python, or install it: ")],
)
def test_without_vllm_the_message_says_how_to_get_it(folder, tmp_path, python, message):
    if python == "bare":
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # sees no installed packages
        python.chmod(0o755)
    with pytest.raises(SystemExit, match=message):
        bench.main(["--policy", str(folder), "--peers", "vllm", "--vllm-python", str(python)])
