"""Two processes learn one policy and one value function, under plain data parallelism, ZeRO-2 and ZeRO-3."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training.processes import torchrun

KINDS = {"ddp": [0, 2], "zero2": [2, 2], "zero3": [3, 2]}
"""ZeRO stage and processes that each of them must really have had."""


@pytest.fixture
def folder(make_policy, tokenizer, tmp_path) -> Path:
    make_policy().save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_learn_the_same(folder, kind):
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    first, second = torchrun("tests.training.ppo.ranks", kind, folder)
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
