"""Options: `SpecGRPOConfig` from YAML and the command line."""

from __future__ import annotations

from dataclasses import fields

import pytest
from accelerate.state import DistributedType, PartialState
from trl import GRPOConfig, TrlParser

from spec_rollout.config import SpecConfig
from spec_rollout.training import PPOConfig, SpecGRPOConfig, SpecRLOOConfig
from spec_rollout.training.config import spec_config

CPU = {"bf16": False, "use_cpu": True}


def test_the_options_of_both_are_flat_fields_with_help():
    own = {option.name: option for option in fields(SpecGRPOConfig)}
    for option in (*fields(SpecConfig), *fields(GRPOConfig)):
        assert own[option.name].default == option.default
    assert all(own[option.name].metadata["help"] for option in fields(SpecConfig))
    assert SpecGRPOConfig("out", **CPU).output_dir == "out"  # the first argument is still the folder


def test_spec_config_takes_its_share(tmp_path):
    args = SpecGRPOConfig(str(tmp_path), num_speculative_tokens=4, max_slots=3, learning_rate=0.5, **CPU)
    assert spec_config(args) == SpecConfig(num_speculative_tokens=4, max_slots=3)


def test_the_command_line_wins_over_yaml(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: a\nuse_cpu: true\nbf16: false\nmax_slots: 5\ndraft_learning_rate: 2e-4\n")
    parser = TrlParser(SpecGRPOConfig)
    line = ["--config", str(recipe), "--max_slots", "6", "--draft_refresh", "false", "--num_speculative_tokens", "2"]
    line += ["--draft_model_path", "head"]
    (args,) = parser.parse_args_and_config(line)
    assert (args.max_slots, args.draft_learning_rate, args.draft_refresh) == (6, 2e-4, False)
    assert args.num_speculative_tokens == 2 and args.output_dir == "a"
    with recipe.open("a") as file:
        file.write("max_slot: 7\n")
    with pytest.raises(ValueError, match="max_slot"):
        parser.parse_args_and_config(line)


def test_help_can_be_printed():
    text = TrlParser(SpecGRPOConfig).format_help()
    assert all(f"--{option.name}" in text for option in fields(SpecConfig))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_vllm": True}, "use_vllm=True .*use_vllm=False"),
        ({"use_transformers_continuous_batching": True}, "use_transformers_continuous_batching=True"),
        ({"num_speculative_tokens": -1}, "num_speculative_tokens=-1 is negative"),
        ({"max_slots": 0}, "max_slots=0 .*at least 1"),
        ({"max_completion_length": None}, "max_completion_length=None"),
        ({"temperature": 0.0}, r"temperature=0.0 .*above 0"),
        ({"generation_kwargs": {"num_beams": 4}}, "num_beams=4"),
        ({"generation_kwargs": {"temperature": 0}}, r"'temperature': 0}.* greedily.*temperature=1.0: .*above 0"),
        ({"generation_kwargs": {"do_sample": False}}, r"'do_sample': False}.* greedily"),
        ({"generation_kwargs": {"temperature": 0.5}}, r"at temperature 0.5, .*divides by temperature=1.0"),
        ({"generation_kwargs": {"temperature": "0.5"}}, r"temperature='0.5' is of type str: give a number"),
        ({"generation_kwargs": {"top_k": 2.5}}, r"top_k=2.5 is of type float: give an integer"),
        ({"generation_kwargs": {"max_new_tokens": "8"}}, r"max_new_tokens='8' is of type str: give an integer"),
        ({"generation_kwargs": {"eos_token_id": [5.5]}}, r"eos_token_id=5.5 is of type float: give an integer"),
        ({"generation_kwargs": {"eos_token_id": 5.5}}, r"eos_token_id=5.5 is of type float: give an integer"),
        ({"generation_kwargs": {"stop_strings": [7]}}, r"stop_strings=7 is of type int: give a string"),
        ({"draft_refresh": "no"}, r"draft_refresh='no' is of type str: give True or False"),
        ({"draft_ngrams": "false"}, r"draft_ngrams='false'"),
        ({"max_slots": "64"}, r"max_slots='64' is of type str: give an integer"),
        ({"num_speculative_tokens": "3"}, r"num_speculative_tokens='3' is of type str: give an integer or None"),
        ({"num_speculative_tokens": 2.5}, r"num_speculative_tokens=2.5 is of type float"),
        ({"draft_overhead": "0.1"}, r"draft_overhead='0.1' is of type str: give a number"),
        ({"temperature": "0.7"}, r"temperature='0.7' is of type str: give a number"),
        ({"top_k": 2.5}, r"top_k=2.5 is of type float: give an integer"),
        ({"max_completion_length": "256"}, r"max_completion_length='256' is of type str"),
        ({"num_generations": "8"}, r"num_generations='8' is of type str: give an integer"),
        ({"gradient_checkpointing": "no"}, r"gradient_checkpointing='no' is of type str: give True or False"),
        ({"generation_kwargs": {"max_length": 40}}, "max_length=40.*max_completion_length"),
    ],
)
def test_conflicts_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SpecGRPOConfig(str(tmp_path), **CPU, **options)


@pytest.mark.parametrize("config_class", [SpecRLOOConfig, PPOConfig])
def test_types_are_checked_in_every_configuration(tmp_path, config_class):
    for options in ({"draft_refresh": "no"}, {"num_generations": "8"}, {"temperature": "1"}):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"{name}={value!r} is of type str: give"):
            config_class(str(tmp_path), **CPU, **options)
    config_class(str(tmp_path), **CPU, temperature=1, top_p=1, draft_overhead=1)  # an integer is a number


def test_a_number_of_ppo_names_itself(tmp_path):
    for name in ("missing_eos_penalty", "vf_coef", "gamma", "whiten_advantages"):
        with pytest.raises(ValueError, match=f"{name}='1' is of type str: give"):
            PPOConfig(str(tmp_path), **CPU, **{name: "1"})


def test_a_plain_configuration_is_checked_too(make_trainer):
    with pytest.raises(ValueError, match="temperature='1'"):
        make_trainer(config_class=GRPOConfig, temperature="1")
    with pytest.raises(ValueError, match="num_beams=2"):
        make_trainer(config_class=GRPOConfig, generation_kwargs={"num_beams": 2})
    with pytest.raises(ValueError, match="use_vllm=True cannot be combined"):
        make_trainer(config_class=GRPOConfig, use_vllm=True)


def test_processes_that_would_train_apart_are_refused(tmp_path, monkeypatch, make_trainer):
    monkeypatch.setenv("WORLD_SIZE", "2")
    # What accelerate finds without use_cpu where there is no accelerator; older ones would join the processes
    # here, and leave ranks behind for all later tests (findings/accelerate-refusal-leaves-ranks-set.sh).
    monkeypatch.setattr(PartialState, "_prepare_backend", lambda *given: (None, DistributedType.NO))
    for config in (SpecGRPOConfig, SpecRLOOConfig, PPOConfig):
        with pytest.raises(ValueError, match=r"WORLD_SIZE=2 processes .*of its own: set use_cpu=True"):
            config(str(tmp_path), bf16=False)
    with pytest.raises(ValueError, match="WORLD_SIZE=2"):
        make_trainer(config_class=GRPOConfig, use_cpu=False)
