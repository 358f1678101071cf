"""From a recipe to a trained policy."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import trl
import yaml
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM

from spec_rollout import cli
from spec_rollout.tasks.arithmetic import accuracy_reward
from spec_rollout.training import SpecGRPOConfig, SpecRLOOConfig
from spec_rollout.training import config as training_config
from spec_rollout.training.async_grpo.config import SpecAsyncGRPOConfig
from spec_rollout.training.launch import ScriptArguments, load_reward_funcs, load_split, parse

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
CONFIGS = {"grpo": SpecGRPOConfig, "rloo": SpecRLOOConfig}
ACCELERATE = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
QUICK = {
    "use_cpu": True,
    "beta": 0.0,
    "bf16": False,
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 6,
    "max_steps": 2,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture
def folder(make_policy, tokenizer, tmp_path) -> Path:
    make_policy().save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


TWO_LINES = {
    "    from trl import GRPOTrainer, get_dataset": (
        "    from spec_rollout.training import SpecGRPOTrainer as GRPOTrainer; from trl import get_dataset"
    ),
    "    from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig": (
        "    from spec_rollout.training import SpecGRPOConfig as GRPOConfig; "
        "from trl import DatasetMixtureConfig, ModelConfig"
    ),
}


def test_two_changed_lines_in_trls_own_script(folder, tmp_path, peeking, monkeypatch):
    source = Path(trl.__file__).parent.joinpath("scripts", "grpo.py").read_text()
    for line, ours in TWO_LINES.items():
        assert source.count(line) == 1
        source = source.replace(line, ours)
    script = tmp_path / "grpo.py"
    script.write_text(source)
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"prompt": ["a", "b c", "d"]}).to_json(tmp_path / "data" / "train.jsonl")
    options = QUICK | {
        "model_name_or_path": folder,
        "dataset_name": tmp_path / "data",
        "reward_funcs": "get_soft_overlong_punishment",
        "output_dir": tmp_path / "out",
        "num_speculative_tokens": 2,
    }
    monkeypatch.setattr(
        sys, "argv", ["grpo.py", *(str(x) for name, value in options.items() for x in (f"--{name}", value))]
    )
    made = peeking.made
    runpy.run_path(str(script), run_name="__main__")
    assert peeking.made == made + 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("algorithm", CONFIGS)
@pytest.mark.parametrize("entry", ["command", "script"])
def test_a_recipe_trains_and_saves(folder, tmp_path, peeking, monkeypatch, entry, algorithm):
    data = tmp_path / "data.jsonl"
    Dataset.from_dict({"prompt": ["a", "b c", "d"], "answer": [1, 2, 3]}).to_json(data)
    given = {"dataset_name": str(data), "reward_funcs": ["arithmetic"], "model_name_or_path": "nowhere"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.dump(QUICK | given | {"output_dir": str(tmp_path / "unused")}))
    out = tmp_path / "out"
    line = ["--config", str(recipe), "--model_name_or_path", str(folder), "--output_dir", str(out)]
    if entry == "command":
        assert cli.main([algorithm, *line, "--max_steps", "1"]) == 0
    else:
        monkeypatch.setattr(sys, "argv", [f"{algorithm}.py", *line, "--max_steps", "1"])
        runpy.run_path(str(ROOT / "trainers" / f"{algorithm}.py"), run_name="__main__")
    AutoModelForCausalLM.from_pretrained(out)
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_recipes_are_valid_and_open_with_their_command(recipe, monkeypatch):
    monkeypatch.setattr(training_config, "require_vllm", lambda: None)
    command = recipe.read_text().splitlines()[0]
    found = re.fullmatch(r"# accelerate launch (?:--config_file (\S+) )?(trainers/(\w+)\.py) --config (\S+)", command)
    assert found[4] == f"recipes/{recipe.name}"
    assert all((ROOT / path).is_file() for path in (found[1] or found[2], found[2]))
    configs = CONFIGS | {"async_grpo": SpecAsyncGRPOConfig}
    if found[3] not in configs:
        pytest.skip(f"{found[3]} has tests of its own")
    line = ["--config", str(recipe), "--use_cpu", "--bf16", "false", "--model_name_or_path", "p", "--max_steps", "7"]
    script, training, model = parse(configs[found[3]], [*line, "--output_dir", "o"])
    assert (model.model_name_or_path, training.max_steps, training.output_dir) == ("p", 7, "o")
    assert load_reward_funcs(script)


def test_there_are_recipes():
    names = {recipe.name for recipe in RECIPES}
    assert names >= {
        "arithmetic_grpo.yaml",
        "arithmetic_rloo.yaml",
        "gsm8k_grpo_0.5b.yaml",
        "gsm8k_grpo_7b_zero3.yaml",
    }
    assert {config.stem for config in ACCELERATE} == {"single", "ddp", "fsdp2", "zero2", "zero3"}


@pytest.mark.parametrize("config", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(config):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(config))
    assert loaded.num_processes == (1 if config.stem == "single" else 8)
    assert config.read_text().startswith(
        f"# accelerate launch --config_file recipes/accelerate/{config.name} trainers/"
    )
    kind = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(config.stem, "DEEPSPEED")
    assert str(loaded.distributed_type).endswith(kind)


def test_abbreviated_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--max_slot"):
        parse(SpecGRPOConfig, ["--use_cpu", "--bf16", "false", "--model_name_or_path", "p", "--max_slot", "3"])


def test_the_built_in_dataset_brings_its_reward():
    script = ScriptArguments(dataset_size=3)
    assert load_split(script, "train").num_rows == 3
    assert load_split(script, "train")["prompt"] != load_split(script, "test")["prompt"]
    assert load_reward_funcs(script) == [accuracy_reward]
    with pytest.raises(ValueError, match="'validation': choose one of train, test"):
        load_split(script, "validation")


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "csv", "saved", "saved_dict", "folder"])
def test_local_datasets(tmp_path, kind):
    rows = Dataset.from_dict({"prompt": ["a", "b", "c"], "answer": [1, 2, 3]})
    path = tmp_path / f"data.{kind}"
    if kind in ("json", "jsonl"):
        rows.to_json(path)
    elif kind == "saved":
        rows.save_to_disk(path)
    elif kind == "saved_dict":
        DatasetDict(train=rows).save_to_disk(path)
    elif kind == "folder":
        path.mkdir()
        rows.to_parquet(path / "train.parquet")
    else:
        getattr(rows, f"to_{kind}")(path)
    loaded = load_split(ScriptArguments(dataset_name=str(path), dataset_size=2), "train")
    assert loaded["prompt"] == ["a", "b"] and loaded["answer"] == [1, 2]


def test_datasets_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_split(ScriptArguments(dataset_name=str(tmp_path / "none.json")), "train")
    Dataset.from_dict({"question": ["a"]}).to_json(tmp_path / "data.json")
    with pytest.raises(ValueError, match="columns question but no `prompt`"):
        load_split(ScriptArguments(dataset_name=str(tmp_path / "data.json")), "train")
    (tmp_path / "data.txt").write_text("a")
    with pytest.raises(ValueError, match=r"none of \.json"):
        load_split(ScriptArguments(dataset_name=str(tmp_path / "data.txt")), "train")


def test_reward_functions(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def length(completions, **kwargs):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    given = ScriptArguments(dataset_name="some/data", reward_funcs=["my_rewards.length", "arithmetic"])
    assert [reward.__name__ for reward in load_reward_funcs(given)] == ["length", "accuracy_reward"]
    with pytest.raises(ValueError, match="reward_funcs is missing: some/data"):
        load_reward_funcs(ScriptArguments(dataset_name="some/data"))
    for name in ("my_rewards.width", "nowhere.at.all", "undotted"):
        with pytest.raises(ValueError, match=f"reward_funcs={name} cannot be imported"):
            load_reward_funcs(ScriptArguments(reward_funcs=[name]))
