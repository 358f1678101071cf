"""The `spec-rollout` command."""

from __future__ import annotations

import importlib
import shutil
import sys
from types import ModuleType

import pytest

from spec_rollout import cli

NAMES = ("grpo", "rloo", "ppo", "demo", "bench", "check", "profile", "report", "simulate", "pretrain-draft", "serve")
NAMES = (*NAMES, "doctor")


def test_without_a_command_the_commands_are_listed(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in NAMES)


def test_an_unknown_command(capsys):
    assert cli.main(["grpoo"]) == 2
    assert f"unknown command 'grpoo': choose one of {', '.join(NAMES)}" in capsys.readouterr().err


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("spec-rollout ")


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("demo", "experiments.demo"),
        ("bench", "bench.bench"),
        ("check", "bench.check"),
        ("profile", "profile.profile"),
        ("report", "profile.report"),
        ("simulate", "simulate.simulate"),
        ("pretrain-draft", "experiments.pretrain"),
        ("serve", "backends.vllm.serve"),
        ("doctor", "doctor"),
    ],
)
@pytest.mark.parametrize(("returned", "status"), [(None, 0), (1, 1)])
def test_a_command_gets_the_rest_of_the_line(monkeypatch, name, home, returned, status):
    module = ModuleType(name)
    given = []
    module.main = lambda argv: given.append(argv) or returned
    monkeypatch.setitem(sys.modules, f"spec_rollout.{home}", module)
    assert cli.main([name, "--json", "file"]) == status
    assert given == [["--json", "file"]]


def test_listing_the_commands_imports_nothing_heavy():
    import subprocess

    code = (
        "import sys; from spec_rollout import cli; cli.main([]); print('torch' in sys.modules, 'trl' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "False False"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--use_cpu", "--bf16", "false", "--model_name_or_path", "x", "--max_step", "3"], "--max_step"),
        (["--use_cpu", "--bf16", "false"], "model_name_or_path is missing"),
        (["--use_cpu", "--bf16", "false", "--model_name_or_path", "x", "--max_slots", "0"], "max_slots=0"),
    ],
)
@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_training_says_what_is_wrong_with_its_options(capsys, algorithm, line, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main([algorithm, *line])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def status(*line: str) -> int:
    try:
        return cli.main(line)
    except SystemExit as stopped:
        return stopped.code


def one_line(capsys) -> str:
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("spec-rollout ")
    return line


@pytest.mark.parametrize(
    ("text", "message"),
    [("max_steps: [1", "cannot be read"), ("- a\n- b\n", "YAML mapping"), (None, "No such file")],
)
def test_a_recipe_that_cannot_be_read_is_one_line(tmp_path, capsys, text, message):
    recipe = tmp_path / "recipe.yaml"
    if text is not None:
        recipe.write_text(text)
    assert status("grpo", "--config", str(recipe)) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize("broken", ["weights", "config", "kind", "nothing"])
def test_a_policy_that_cannot_be_read_is_one_line(folder, tmp_path, capsys, broken):
    policy = tmp_path / "policy"
    shutil.copytree(folder, policy)
    if broken == "weights":
        (policy / "model.safetensors").write_bytes(b"")
    elif broken == "config":
        (policy / "config.json").write_text("{")
    elif broken == "kind":
        (policy / "config.json").write_text('{"model_type": "nothing of this name"}')
    else:
        (policy / "config.json").unlink()
    line = ["--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    assert status("grpo", "--model_name_or_path", str(policy), *line) == 2
    assert cli.PROGRAM in one_line(capsys)


def test_a_package_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "spec_rollout.simulate.simulate", None)
    with pytest.raises(ModuleNotFoundError):  # a fault of our own
        cli.main(["simulate"])
    monkeypatch.setattr(cli, "import_module", lambda name: importlib.import_module("no_such_package"))
    assert cli.main(["simulate"]) == 2
    assert "no_such_package is not installed: `spec-rollout doctor`" in one_line(capsys)


def test_a_fault_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "grpo", lambda argv: int("a fault of a library's or ours"))
    monkeypatch.setattr(cli, "__package__", "another")
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["grpo"])
