"""The examples run, on tiny policies: only what would be downloaded, and lengths, are put in their place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import datasets
import matplotlib
import pytest
from datasets import Dataset

from spec_rollout.tasks.reference_policy import RECIPES
from tests.training import talking

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = '"Qwen/Qwen2.5-0.5B-Instruct"'
FEW = "per_device_train_batch_size=4, num_generations=2, use_cpu=True, bf16=False, report_to='none', beta=0.0"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def example(name: str, policy: Path, options: str) -> dict:
    """What the script defines, with the policy in the folder `policy`."""
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    for given, small in ((MODEL, repr(str(policy))), ('output_dir="out"', f'output_dir="out", {FEW}, {options}')):
        assert source.count(given) == 1
        source = source.replace(given, small)
    scope = {"__name__": "example"}
    exec(compile(source, name, "exec"), scope)
    return scope


def test_two_lines(folder, monkeypatch):
    prompts = Dataset.from_dict({"prompt": ["3 + 4 =", "9 - 2 ="] * 4})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: prompts)
    trainer = example("grpo_two_lines.py", folder, "max_steps=1, max_completion_length=8")["main"]()
    assert trainer.state.global_step == 1
    changed = [line for line in (EXAMPLES / "grpo_two_lines.py").read_text().splitlines() if "spec_rollout" in line]
    assert len(changed) == 2 and all("# was: from trl import" in line for line in changed)


def test_an_agent_with_a_tool(tmp_path):
    call = ("<tool_call>", '\n{"name": "multiply", "arguments": ', '{"a": 3, "b": 4}', "}\n</tool_call>")
    tokenizer = talking.make_tokenizer(call)
    talking.make_policy(tokenizer, call).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    scope = example("agent_with_tool.py", tmp_path / "policy", "max_steps=1, logging_steps=1")
    trainer = scope["main"]()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert rewards == [0.5]  # each of them calls the tool; none says the product
    asked = scope["questions"](2)
    messages = [[{"role": "assistant", "content": f"It is {asked[0]['answer']}."}], [{"role": "assistant"}]]
    assert scope["right_answer"](messages, asked["answer"]) == [1.0, 0.0]


def test_the_notebook(monkeypatch):
    """Cell by cell, with a policy of a few steps and a run of two."""
    monkeypatch.setitem(RECIPES, "tiny", replace(RECIPES["tiny"], num_layers=2, num_problems=24, batch_size=2))
    matplotlib.use("agg")
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    source = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in cells)
    scope: dict = {}
    for number, code in enumerate(source):
        for given, small in (
            ("max_steps=10", "max_steps=2"),
            ("max_completion_length=128", "max_completion_length=16"),
        ):
            code = code.replace(given, small)
        exec(compile(code, f"cell {number}", "exec"), scope)
    assert scope["identical"] and scope["stats"].drafted > 0
    assert scope["trainer"].state.global_step == 2 and scope["log"]
    assert [axis.get_title() for axis in scope["axes"]] == scope["names"] and all(a.lines for a in scope["axes"])
