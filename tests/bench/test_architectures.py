"""`spec-rollout check --architectures`: each causal language model is decoded identically or clearly refused."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers

from spec_rollout import cli
from spec_rollout.bench import architectures
from spec_rollout.bench.architectures import DIFFERENT, IDENTICAL, NOT_MADE, REFUSED, Finding, examine
from spec_rollout.bench.tiny_models import LARGEST, make_tiny
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import Completion

ROOT = Path(__file__).parents[2]
SAMPLE = {
    "llama": IDENTICAL,
    "gemma3_text": IDENTICAL,
    "deepseek_v3": IDENTICAL,
    "phimoe": IDENTICAL,
    "mpt": IDENTICAL,
    "qwen3_5_text": IDENTICAL,
    "bart": REFUSED,
    "bloom": REFUSED,
    "rwkv": REFUSED,
    "blt": NOT_MADE,
}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample(name):
    found = examine(name)
    assert found.outcome == SAMPLE[name], found.reason
    model = f"`{found.model}`" if found.model else ""
    kept = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    if f"of transformers {transformers.__version__}:" in kept:  # else another version's table
        assert f"| `{name}` | {model} | {found.outcome} |" in kept
    assert bool(found.reason) == (found.outcome != IDENTICAL) and bool(found.model) == (found.outcome != NOT_MADE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", architectures.architectures())
def test_every_architecture(name, dtype):
    found = examine(name, dtype)
    assert found.outcome in (IDENTICAL, REFUSED, NOT_MADE), found.reason


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", architectures.architectures())
def test_every_attention(name, dtype, attention):
    found = examine(name, dtype, _attn_implementation=attention)
    assert found.outcome in (IDENTICAL, REFUSED, NOT_MADE) or dtype != torch.float32, found.reason


def test_a_difference_is_told(monkeypatch):
    class Wrong(RolloutEngine):
        def generate(self, *args, **options):
            first, *rest = super().generate(*args, **options)
            if self.drafter is not None:
                first = Completion([*first.token_ids[:-1], 1 - first.token_ids[-1] % 2], first.logprobs, "length")
            return [first, *rest]

    monkeypatch.setattr(architectures, "RolloutEngine", Wrong)
    found = examine("llama")
    assert found.outcome == DIFFERENT and "other tokens with OracleDrafter" in found.reason
    assert architectures.main(["--architectures", "--only", "llama"]) == 1


def test_the_command(tmp_path, capsys):
    out = tmp_path / "table.json"
    ways = ["--dtypes", "float32,bfloat16", "--attentions", "own,sdpa"]
    assert cli.main(["check", "--architectures", "--only", "llama,mpt,bart", *ways, "--json", str(out)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "LlamaForCausalLM" in printed
    assert "float32 own 2 1 0 0 100 %" in printed and "bfloat16 sdpa 1 1 0 1 100 %" in printed  # mpt knows no sdpa
    findings = json.loads(out.read_text())["findings"]
    assert [f["outcome"] for f in findings[:3]] == [IDENTICAL, IDENTICAL, REFUSED]
    assert [f["dtype"] for f in findings[::3]] == ["float32", "float32", "bfloat16", "bfloat16"]
    with pytest.raises(SystemExit, match="knows no such model type"):
        cli.main(["check", "--architectures", "--only", "nothing"])
    with pytest.raises(SystemExit):
        cli.main(["check", "--architectures", "--dtypes", "int8"])
    assert "int8: each must be one of float32" in capsys.readouterr().err


def test_only_in_exact_arithmetic_another_token_is_a_fault(monkeypatch):
    monkeypatch.setattr(architectures, "examine", lambda *_, **__: Finding("llama", "L", DIFFERENT, "", 0.5))
    command = ["--architectures", "--only", "llama", "--dtypes"]
    assert architectures.main([*command, "bfloat16"]) == 0
    assert architectures.main([*command, "bfloat16,float64"]) == 1


def test_the_page_is_that_of_the_script():
    """The page that is kept was made by the script, and holds each architecture once."""
    spec = importlib.util.spec_from_file_location("page", ROOT / "scripts" / "make_architectures_page.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    kept = script.PAGE.read_text(encoding="utf-8")
    main, _, grid = kept.partition(script.GRID)
    assert kept.startswith(script.TEXT) and f"| {DIFFERENT} |" not in main
    assert grid.count("| float32 | ") == 3  # attentions; none of its rows differs
    assert all("| 0 |" in line for line in grid.splitlines() if line.startswith("| float32 |"))
    rows = [line for line in main.splitlines() if line.startswith("| `")]
    assert len(rows) == len(set(rows)) > 100


def test_tiny_is_tiny():
    model = make_tiny("qwen3_moe")
    assert sum(parameter.numel() for parameter in model.parameters()) < LARGEST // 10
