"""docs/trl.md names every option and every metric."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from spec_rollout.config import SpecConfig
from spec_rollout.records import RefreshStats, RolloutStats, StepStats
from spec_rollout.training import SpecGRPOConfig
from spec_rollout.training.metrics import local_sums, metrics
from spec_rollout.training.mismatch import MAX, MEAN

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")
OWN = {"importance_sampling_correction", "overlong_prompts"}


def cells(heading: str) -> dict[str, str]:
    """The first two cells of each row of the tables under `heading`."""
    part = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in part.splitlines() if line.startswith("| `")]
    return {name.strip().strip("`"): value.strip().strip("`") for name, value in rows}


def test_every_option_is_described_with_its_default():
    described = cells("Options")
    assert {option.name for option in fields(SpecConfig)} | OWN == described.keys()
    defaults = {option.name: str(option.default) for option in fields(SpecGRPOConfig)}
    assert {name: defaults[name] for name in described} == described


def test_every_metric_is_described():
    stats = RolloutStats(steps=[StepStats(1, 1, 1, 2, [1])], seconds=1.0)
    sums = local_sums(stats, RefreshStats(1, 10, 0.5, 1.0, 1), 1.0, 1, True, ranks=2)
    logged = metrics({name: 2 * value for name, value in sums.items()})
    assert logged.keys() | {MEAN, MAX} == cells("Logged metrics").keys()


def test_every_recipe_is_listed():
    here = {path.name for path in (ROOT / "recipes").glob("*.yaml")} - {"arithmetic_ppo.yaml"}
    assert [name for name in sorted(here) if f"`{name}`" not in PAGE] == []
    assert all(f"recipes/accelerate/{path.name}" in PAGE for path in (ROOT / "recipes/accelerate").glob("[dfz]*.yaml"))
