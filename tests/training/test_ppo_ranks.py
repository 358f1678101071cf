"""Two processes learn one policy and one value function, under plain data parallelism, ZeRO-2 and ZeRO-3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
KINDS = {"ddp": [0, 2], "zero2": [2, 2], "zero3": [3, 2]}
"""ZeRO stage and processes that each of them must really have had."""


def torchrun(kind: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, "-m", "tests.training.ppo_ranks", kind, str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=300,
    )


@pytest.fixture
def folder(make_policy, tokenizer, tmp_path) -> Path:
    make_policy().save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_learn_the_same(folder, kind):
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    done = torchrun(kind, folder)
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["kind"] == second["kind"] == KINDS[kind]
    assert first["seen"] != second["seen"]
    assert first["weights"] == second["weights"] and first["weights"]["value_function.weight"] != 0
    assert first["coef"] == second["coef"] != 0.1
    assert first["log"] == second["log"] and any("explained_variance" in row for row in first["log"])
    for (own, tokens), (other, others) in zip(first["whitened"], second["whitened"], strict=True):
        assert abs(own) > 1e-2 and abs(own + other) < 1e-3 * (tokens + others)  # mean 0 over both, not over each
    saved = folder / "run" / "checkpoint-8"
    assert load_file(saved / "value_head.safetensors")["weight"].double().sum() == pytest.approx(
        first["weights"]["value_function.weight"]
    )
    assert not any("value_function" in name for name in load_file(saved / "model.safetensors"))
