"""What is said of the house is so: its picture, the walk through it, whom its scripts are for, how large rooms are."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WALK = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STOPS = re.findall(r"\[`[^`]+`\]\(\.\./(spec_rollout/[^)]+)\)\s`(\w+)`", WALK)
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


def functions(source: str) -> dict[str, int]:
    """Names of the functions in `source`, with their lines."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(ast.parse(source)) if isinstance(n, kinds)}


def test_the_picture_is_that_of_the_imports(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_architecture_figure.py", "--check"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "scripts" / "make_architecture_figure.py"), run_name="__main__")
    assert not stopped.value.code, capsys.readouterr().out


def test_another_house_would_have_another_picture():
    script = runpy.run_path(str(ROOT / "scripts" / "make_architecture_figure.py"))
    graph = {"cli": {"training", "records"}, "training": {"records"}, "records": set()}
    assert script["reduced"](graph) == {"cli": {"training"}, "training": {"records"}, "records": set()}
    assert {name: level for name, (_, level) in script["placed"](graph).items()} == {
        "records": 0,
        "training": 1,
        "cli": 2,
    }
    assert "training" in script["imported"]({"cli", "training"})["cli"]


@pytest.mark.parametrize(("path", "verb"), STOPS)
def test_a_stop_of_the_walk_is_a_file_and_a_verb(path, verb):
    assert verb in functions((ROOT / path).read_text(encoding="utf-8"))


def test_the_walk_has_stops():
    assert len(STOPS) > 25 and STOPS[0] == ("spec_rollout/training/grpo.py", "_generate_single_turn")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_for_users_or_says_that_it_is_not(path):
    """One for users is thin."""
    source = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source)).startswith("For maintainers: ") or len(source.splitlines()) < 60


FINDINGS = sorted((ROOT / "findings").glob("*.sh"))
TEXTS = [path for kind in ("docs/*.md", "spec_rollout/**/*.py", "tests/**/*.py", "*.md") for path in ROOT.glob(kind)]


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.name)
def test_a_finding_is_listed_and_is_a_shell_script(path):
    """What it states is seen by running it, which needs a package index."""
    assert f"[{path.name}]({path.name})" in (ROOT / "findings" / "README.md").read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", path]).returncode == 0


def test_what_refers_to_a_finding_finds_it():
    named = {name for text in TEXTS for name in re.findall(r"findings/([\w-]+\.sh)", text.read_text(encoding="utf-8"))}
    assert named and named <= {path.name for path in FINDINGS}


ROOMS = [
    path for top in ("spec_rollout", "scripts", "tests", "trainers") for path in sorted((ROOT / top).rglob("*.py"))
]
MOST_LINES, MOST_OF_A_FUNCTION = 245, 60


def test_no_room_is_larger_than_one_can_see():
    """A file that nears the bound is often two things: split it there, not at the line."""
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in ROOMS}
    assert {name: size for name, size in lines.items() if size > MOST_LINES} == {}


def test_a_function_fits_a_screen():
    sizes = {
        f"{path.relative_to(ROOT)}: {name}": size
        for path in ROOMS
        for name, size in functions(path.read_text(encoding="utf-8")).items()
    }
    assert len(sizes) > 1000 and {name: size for name, size in sizes.items() if size > MOST_OF_A_FUNCTION} == {}
