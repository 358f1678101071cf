"""Every command in the README and the docs parses, the short ones run, and every link leads somewhere."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from spec_rollout import cli
from spec_rollout.backends.vllm import serve as vllm_serve
from spec_rollout.tasks.arithmetic import problems
from spec_rollout.training import config, launch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTS = ("spec-rollout ", "python scripts/", "accelerate launch ", "make ")
CLIENTS = ("pip ",)
"""Not ours to parse."""


def commands(page: Path) -> list[str]:
    """Fenced shell lines, and inline code that begins like one of our commands."""
    text = page.read_text(encoding="utf-8")
    fenced = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = [code for code in re.findall(r"`([^`\n]+)`", prose) if code.startswith(STARTS)]
    lines = [re.split(r"\s+#\s", line)[0].strip() for line in fenced] + inline
    return [line for line in dict.fromkeys(lines) if line]


EVERY = [(page.name, line) for page in PAGES for line in commands(page)]


class Parsed(Exception):
    """A command line was understood."""


@pytest.fixture
def stops_after_parsing(monkeypatch):
    parse_args, parse = argparse.ArgumentParser.parse_args, launch.parse

    def stop(*given, **options):
        parse_args(*given, **options)
        raise Parsed

    def stop_serving():
        raise Parsed

    def stop_training(config_class, argv):
        on_a_cpu = ["--use_cpu", "true", "--bf16", "false"]  # a recipe may be for GPUs
        parse(config_class, [*(argv or sys.argv[1:]), *on_a_cpu])
        raise Parsed

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(launch, "parse", stop_training)
    monkeypatch.setattr(config, "require_vllm", lambda: None)
    monkeypatch.setattr(vllm_serve, "require_vllm", stop_serving)


def understood(words: list[str], monkeypatch) -> None:
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets)
    elif program == "accelerate":
        assert rest[:2] == ["launch", "--config_file"] or rest[1].startswith("trainers/")
        script = next(i for i, word in enumerate(rest) if word.startswith("trainers/"))
        assert all((ROOT / word).exists() for word in rest if "/" in word)
        understood(["spec-rollout", Path(rest[script]).stem, *rest[script + 1 :]], monkeypatch)
    elif program == "python":
        monkeypatch.setattr(sys, "argv", rest)
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / rest[0]), run_name="__main__")
    elif len(rest) > 1:
        assert program == "spec-rollout"
        with pytest.raises(Parsed):
            assert cli.main(rest) == 0
    else:
        assert rest[0] in cli.COMMANDS or rest[0] in ("--help", "--version")


@pytest.mark.parametrize(("page", "line"), EVERY, ids=lambda value: value[:60])
def test_a_documented_command_parses(page, line, stops_after_parsing, monkeypatch):
    if not line.startswith(CLIENTS):
        understood(shlex.split(line), monkeypatch)


def test_commands_are_found():
    assert len(EVERY) > 15 and {name for name, _ in EVERY} >= {"README.md", "trl.md", "profile.md"}


@pytest.mark.parametrize("line", ["spec-rollout grpo --config none.yaml", "spec-rollout bench --polcy x", "make tset"])
def test_a_command_that_is_wrong_is_found(line, stops_after_parsing, monkeypatch):
    with pytest.raises((SystemExit, AssertionError, pytest.fail.Exception)):
        understood(shlex.split(line), monkeypatch)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_runs(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code in (0, None) and "usage" in capsys.readouterr().out


def test_the_script_of_the_readme_trains(folder, tmp_path, monkeypatch):
    """On a tiny policy and a few prompts: only what would be downloaded, and the length, is put in its place."""
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    few = "max_steps=2, per_device_train_batch_size=4, num_generations=2, max_completion_length=8, use_cpu=True"
    for given, here in (
        ('"Qwen/Qwen2.5-0.5B-Instruct"', repr(str(folder))),
        ('output_dir="out"', f"output_dir={str(tmp_path)!r}, bf16=False, report_to='none', {few}"),
    ):
        assert script.count(given) == 1
        script = script.replace(given, here)
    prompts = Dataset.from_dict({"prompt": [problem.prompt for problem in problems("train", 8)]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: prompts)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    scope = {}
    exec(compile(script, "README.md", "exec"), scope)
    log = scope["trainer"].state.log_history
    assert scope["trainer"].state.global_step == 2 and any("speculative/goodput" in entry for entry in log)


@pytest.mark.parametrize("target", ["demo", "test", "lint", "test-vllm", "test-latest", "test-lowest"])
def test_make_knows_its_targets(target):
    assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0


def test_the_tables_are_those_of_the_measured_figures(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_readme_figures.py", "--check"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "scripts" / "make_readme_figures.py"), run_name="__main__")
    assert not stopped.value.code, capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        found = page.parent / path if path else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target
