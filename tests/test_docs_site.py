"""The site of `make docs`: every page and every public name is on it, and it builds without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import spec_rollout

ROOT = Path(spec_rollout.__file__).parents[1]


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [page for entry in config["nav"] for page in entry.values()]
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md")) and config["strict"]


def test_every_public_name_is_in_the_api():
    named = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(name.rpartition(".")[2] for name in named) == spec_rollout.__all__


@pytest.mark.skipif(
    not (find_spec("material") and find_spec("mkdocstrings")), reason="the docs extra is not installed"
)
def test_it_builds(tmp_path):
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert "num_speculative_tokens" in page and (tmp_path / "site" / "benchmarks" / "cpu-small-drift.png").exists()
