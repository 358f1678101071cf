"""The package as pip gets it: what lies in the wheel, what it says, and that it runs where nothing else is."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest

import spec_rollout

ROOT = Path(spec_rollout.__file__).parent.parent
SHIPPED = ("spec_rollout", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, **options) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of the wheel and the source archive, built from a copy so that nothing is left in the tree."""
    for tool in ("build", "twine", "setuptools"):
        pytest.importorskip(tool, reason="the dev extra brings it")
    source = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", source)
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (found,) = built.glob("*.whl")
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "spec_rollout").rglob("*.py")}
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == ours | {"spec_rollout/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_what_the_wheel_says_of_itself(wheel):
    with zipfile.ZipFile(wheel) as archive:
        read = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert "spec-rollout = spec_rollout.cli:main" in read["entry_points.txt"]
    metadata = Parser().parsestr(read["METADATA"])
    assert metadata["Name"] == "spec-rollout" and metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert any(need.startswith("trl<2,>=") for need in metadata.get_all("Requires-Dist"))


def test_twine_finds_nothing_wrong(built):
    said = run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())
    assert said.count("PASSED") == 2


def test_the_source_archive_builds_too(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as inside:
        names = {name.partition("/")[2] for name in inside.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "spec_rollout/py.typed", "spec_rollout/cli.py"} <= names


GRPO = (
    *("--max_steps", "1", "--per_device_train_batch_size", "4", "--num_generations", "2"),
    *("--max_completion_length", "8", "--use_cpu", "true"),
)
STRICT = ("-W", "error::DeprecationWarning:spec_rollout", "-W", "error::FutureWarning:spec_rollout")


def one_step(python: Path | str, folder: Path, scratch: Path) -> None:
    """GRPO from the command line, by the package that `python` finds from an empty working directory."""
    recipe = ROOT / "recipes" / "arithmetic_grpo.yaml"
    options = ("--config", recipe, "--model_name_or_path", folder, "--output_dir", scratch / "out", *GRPO)
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(scratch)}
    run(python, *STRICT, "-m", "spec_rollout.cli", "grpo", *options, cwd=scratch, env=os.environ | own)
    assert (scratch / "out" / "model.safetensors").is_file()


def test_one_step_of_grpo_from_the_unpacked_wheel(wheel, folder, tmp_path, monkeypatch):
    """In this environment, but by the files of the wheel: what is missing there is missing for whoever installs it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    assert Path(importlib.util.find_spec("spec_rollout").origin).parent == ROOT / "spec_rollout"
    said = run(sys.executable, "-c", "import spec_rollout; print(spec_rollout.__file__)", cwd=tmp_path)
    assert Path(said.strip()).is_relative_to(tmp_path / "site")
    one_step(sys.executable, folder, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_step_of_grpo_where_only_the_wheel_was_installed(wheel, folder, tmp_path, monkeypatch):
    """No constraints: the newest of what the ranges allow, but for torch, whose default wheel is for GPUs."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    venv.create(tmp_path / "empty", with_pip=True)
    binaries = tmp_path / "empty" / "bin"
    torch = version("torch").partition("+")[0]
    run(binaries / "python", "-m", "pip", "install", "--quiet", wheel, f"torch=={torch}")
    assert run(binaries / "spec-rollout", "--version").startswith("spec-rollout ")
    one_step(binaries / "python", folder, tmp_path)
