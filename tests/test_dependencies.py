"""Every package that is imported is declared: what another one happens to bring today may be gone tomorrow."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import spec_rollout

ROOT = Path(spec_rollout.__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement)[0].replace("-", "_") for requirement in requirements}


DECLARED = names(PROJECT["dependencies"])
OPTIONAL = names([*EXTRAS["deepspeed"], *EXTRAS["peft"], *EXTRAS["vllm"]])


def imported(source: str) -> set[str]:
    """The packages outside the standard library that `source` imports, wherever it does."""
    tops = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            tops |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            tops.add(node.module.partition(".")[0])
    return tops - sys.stdlib_module_names - {"spec_rollout"}


@pytest.mark.parametrize("folder", ["spec_rollout", "trainers"])
def test_every_import_is_declared(folder):
    found = {top for path in (ROOT / folder).rglob("*.py") for top in imported(path.read_text(encoding="utf-8"))}
    assert found - DECLARED - OPTIONAL == set()


def test_nothing_is_declared_in_vain():
    found = {top for path in (ROOT / "spec_rollout").rglob("*.py") for top in imported(path.read_text("utf-8"))}
    assert DECLARED - found == set()


def test_an_undeclared_import_is_found():
    assert imported("def f():\n    from httpx import ConnectError\nimport os") - DECLARED == {"httpx"}
