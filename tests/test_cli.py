"""The `spec-rollout` command."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from spec_rollout import cli

NAMES = ("grpo", "rloo", "ppo", "demo", "bench", "check", "profile", "report", "simulate", "pretrain-draft", "serve")


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
