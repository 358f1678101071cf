"""`spec-rollout doctor` on machines that lack something."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from spec_rollout import cli, doctor

ROOT = Path(doctor.__file__).parents[1]
DECLARED = ["torch>=2.13", "trl<2,>=1.16", 'peft>=0.13; extra == "peft"', 'ruff>=0.12; extra == "dev"']
VERSIONS = {"torch": "2.13.0+cpu", "trl": "1.16.0", "peft": "0.21.2"}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Versions by package, to be changed; everything else is well."""
    versions = dict(VERSIONS)

    def version(name):
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "requires", lambda name: DECLARED)
    monkeypatch.setattr(doctor, "EVERY_NAME", "pass")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)
    return versions


def line_of(printed: str, name: str) -> list[str]:
    """The mark and what was found about `name`, and the remedy."""
    lines = printed.splitlines()
    at = next(i for i, line in enumerate(lines) if name in line)
    remedy = lines[at + 1].strip() if lines[at + 1].strip().startswith("->") else ""
    return [lines[at].split()[0], lines[at], remedy]


def test_all_is_well(machine, capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert line_of(printed, "torch 2.13.0 (tested with 2.13.0)")[0] == "ok"
    assert line_of(printed, "peft 0.21.2")[0] == "ok" and "ruff" not in printed
    assert "Everything that is required is there." in printed


@pytest.mark.parametrize(
    ("name", "version", "mark", "remedy"),
    [
        ("trl", None, "BROKEN", "pip install 'trl<2,>=1.16'"),
        ("trl", "2.0.0", "BROKEN", "pip install 'trl<2,>=1.16'"),
        ("torch", "2.9.0", "BROKEN", "pip install 'torch>=2.13'"),
        ("peft", None, "note", "pip install 'peft>=0.13"),
        ("peft", "0.12.0", "note", "pip install 'peft>=0.13"),
    ],
)
def test_a_version_that_does_not_do(machine, capsys, name, version, mark, remedy):
    machine.pop(name)
    if version:
        machine[name] = version
    assert cli.main(["doctor"]) == (mark == "BROKEN")
    found = line_of(capsys.readouterr().out, f"{name} ")
    assert found[0] == mark and remedy in found[2]


def test_an_import_that_fails_is_named_without_a_traceback(machine, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "EVERY_NAME", "raise OSError('libc10.so is not there')")
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr()
    assert "BROKEN  spec_rollout cannot be imported: OSError: libc10.so is not there" in printed.out
    assert "Traceback" not in printed.out + printed.err


def test_what_only_some_uses_need(machine, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("spec_rollout.draft.muon.multiplies_bfloat16", lambda device: False)
    monkeypatch.delenv("CXX")
    real = shutil.which
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None if "++" in name else real(name))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert line_of(printed, "bfloat16")[0] == "note" and "bf16: false" in line_of(printed, "bfloat16")[2]
    assert line_of(printed, "no C++ compiler")[2] == "-> apt install g++"
    assert line_of(printed, "cannot be written")[2] == "-> --calibration_cache FOLDER"


def test_a_package_that_is_only_on_the_path(machine, monkeypatch, capsys):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", missing)
    assert cli.main(["doctor"]) == 0 and "pip install ." in capsys.readouterr().out


def test_the_tested_versions_are_those_of_the_constraints():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: pinned[name] for name in doctor.TESTED} == doctor.TESTED
    project = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[\n(.*?)^\]", project, re.DOTALL | re.MULTILINE)[1]
    needs = {Requirement(text).name: Requirement(text) for text in re.findall(r'"(.*)"', block)}
    assert needs.keys() <= doctor.TESTED.keys()
    assert all(doctor.TESTED[name] in need.specifier for name, need in needs.items())


def test_on_this_machine():
    """For real, in another process: no traceback, and a status that fits what is said."""
    line = [sys.executable, "-m", "spec_rollout.cli", "doctor"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == ("BROKEN" in done.stdout), done.stdout
