"""From a YAML file and a command line to a trained policy, the same for every trainer."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from spec_rollout.backends import hub
from spec_rollout.tasks import arithmetic, gsm8k

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

ARITHMETIC = "arithmetic"
ARITHMETIC_SPLITS = {"train": "rl", "test": "heldout"}
GSM8K = "gsm8k"
REWARDS = {ARITHMETIC: arithmetic.accuracy_reward, GSM8K: gsm8k.accuracy_reward}
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class ScriptArguments:
    r"""
    What a run needs besides the trainer's and the model's options.

    Parameters:
        dataset_name (`str`, *optional*, defaults to `"arithmetic"`):
            Dataset of the Hub, local folder, local file, or `"arithmetic"`.
        dataset_config (`str`, *optional*):
            Configuration of the dataset.
        dataset_format (`str`, *optional*):
            `"gsm8k"` makes prompts and answers of GSM8K's columns.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on, if the trainer evaluates.
        dataset_size (`int`, *optional*):
            Number of rows to use of each split.
        reward_funcs (`list[str]`, *optional*):
            Reward functions, by dotted path, `"arithmetic"` or `"gsm8k"`.
    """

    dataset_name: str = field(
        default=ARITHMETIC,
        metadata={
            "help": "Dataset of the Hub, local folder, local file (.json, .jsonl, .parquet, .csv), or `arithmetic`, "
            "which is built in. It needs a column `prompt` and what the reward functions read."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_format: str | None = field(
        default=None,
        metadata={
            "help": "`gsm8k` makes conversational prompts and plain answers of the columns `question` and `answer`. "
            "`None` takes the columns as they are.",
            "choices": [GSM8K],
        },
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, if the trainer evaluates (`eval_strategy`)."}
    )
    dataset_size: int | None = field(
        default=None,
        metadata={"help": "Number of rows to use of each split. `None` is all; 2000 for `arithmetic`."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions, by dotted path (`my_module.my_reward`, `trl.rewards.accuracy_reward`) or "
            "`arithmetic`, `gsm8k`. `None` is the one that belongs to the built-in dataset or to `dataset_format`."
        },
    )


def launch(trainer_class: type[Trainer], config_class: type[TrainingArguments], argv: Sequence[str] | None = None):
    """Read the options, build the trainer, train, save; returns the trainer.

    Args:
        argv: command line, `sys.argv` if None: `--config FILE.yaml` and any option of `config_class`, TRL's
            [`~trl.ModelConfig`] and [`ScriptArguments`].

    Raises:
        SystemExit: status 2, after saying which option is unknown or has a value that cannot be used, or that there is
            no such policy.
        ValueError: the dataset or a reward function cannot be loaded.
    """
    try:
        script, training, model = parse(config_class, argv)
        hub.require(model.model_name_or_path, revision=model.model_revision)
    except ValueError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
    }
    training.model_init_kwargs = model_init_kwargs | (training.model_init_kwargs or {})
    trainer = trainer_class(
        model=model.model_name_or_path,
        reward_funcs=load_reward_funcs(script),
        args=training,
        train_dataset=load_split(script, script.dataset_train_split),
        eval_dataset=load_split(script, script.dataset_test_split) if training.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model(training.output_dir)
    trainer.save_state()  # for spec-rollout report
    return trainer


def parse(
    config_class: type[TrainingArguments], argv: Sequence[str] | None = None
) -> tuple[ScriptArguments, TrainingArguments, ModelConfig]:
    """The command line over the YAML file over the defaults.

    Raises:
        ValueError: an unknown option, in either place, a value out of its range, or a missing policy.
    """
    model_class = getattr(config_class, "model_class", ModelConfig)  # where options of the same name would collide
    parser = TrlParser((ScriptArguments, config_class, model_class), allow_abbrev=False)
    script, training, model = parser.parse_args_and_config(argv)
    if model.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: give the policy's folder or its name on the Hub.")
    return script, training, model


def load_split(script: ScriptArguments, split: str) -> Dataset:
    """One split of the dataset that `script` names.

    Raises:
        ValueError: it is not there, or has no prompts.
    """
    dataset = _load(script, split)
    if script.dataset_format == GSM8K:
        dataset = _gsm8k_prompts(dataset, script.dataset_name)
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"{script.dataset_name} has the columns {', '.join(dataset.column_names)} but no `prompt`: rename the one "
            "that holds the prompts."
        )
    size = script.dataset_size
    return dataset if size is None else dataset.select(range(min(size, len(dataset))))


def _gsm8k_prompts(rows: Dataset, name: str) -> Dataset:
    missing = [column for column in gsm8k.COLUMNS if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"dataset_format=gsm8k needs the columns {', '.join(gsm8k.COLUMNS)}, but {name} has no "
            f"{' and no '.join(missing)}: rename its columns, or leave dataset_format out."
        )
    return rows.map(gsm8k.to_prompt, remove_columns=[c for c in rows.column_names if c != "answer"])


def _load(script: ScriptArguments, split: str) -> Dataset:
    name, path = script.dataset_name, Path(script.dataset_name)
    if name == ARITHMETIC:
        if split not in ARITHMETIC_SPLITS:
            raise ValueError(f"{name} has no split {split!r}: choose one of {', '.join(ARITHMETIC_SPLITS)}.")
        return arithmetic.prompt_dataset(ARITHMETIC_SPLITS[split], script.dataset_size or 2000)
    if path.is_file():
        return _load_file(path, split)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():  # written by `save_to_disk`
        saved = load_from_disk(name)
        if not isinstance(saved, DatasetDict):
            return saved
        if split not in saved:
            raise ValueError(f"{name} has no split {split!r}: choose one of {', '.join(saved)}.")
        return saved[split]
    if not path.exists() and (path.is_absolute() or path.suffix in FILE_FORMATS or name.startswith(".")):
        raise ValueError(f"dataset_name={name} does not exist: give a dataset of the Hub, a folder or a file.")
    hub.require(name, "dataset")
    return load_dataset(name, script.dataset_config, split=split)


def _load_file(path: Path, split: str) -> Dataset:
    if path.suffix not in FILE_FORMATS:
        raise ValueError(f"{path} is none of {', '.join(FILE_FORMATS)}: convert it to one of them.")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty: it must hold at least 1 row.")
    try:
        return load_dataset(FILE_FORMATS[path.suffix], data_files={split: str(path)}, split=split)
    except (DatasetGenerationError, ValueError) as error:  # before datasets 5 what reads lines raises it itself
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error.__cause__ or error}") from error


def load_reward_funcs(script: ScriptArguments) -> list[Callable]:
    """The reward functions that `script` names.

    Raises:
        ValueError: there is none, or one cannot be imported.
    """
    own = script.dataset_format or script.dataset_name
    names = script.reward_funcs or [own] * (own in REWARDS)
    if not names:
        raise ValueError(f"reward_funcs is missing: {script.dataset_name} has none of its own; give a dotted path.")
    return [REWARDS[name] if name in REWARDS else _import(name) for name in names]


def _import(dotted: str) -> Callable:
    module, _, name = dotted.rpartition(".")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a reward of the user's own lies beside the recipe
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"reward_funcs={dotted} cannot be imported ({error}): give `module.function`, found from the working "
            f"directory, or one of {', '.join(REWARDS)}."
        ) from error
