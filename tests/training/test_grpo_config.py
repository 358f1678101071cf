"""Options: `SpecGRPOConfig` from YAML and the command line, and generation options honoured or refused."""

from __future__ import annotations

from dataclasses import fields

import pytest
from transformers import GenerationConfig
from trl import GRPOConfig, TrlParser

from spec_rollout.config import SpecConfig
from spec_rollout.training import PPOConfig, SpecGRPOConfig, SpecGRPOTrainer, SpecRLOOConfig, SpecRLOOTrainer
from spec_rollout.training.config import spec_config
from spec_rollout.training.sampling_params import inherited, sampling_params, trainer_params

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
    for config in (SpecGRPOConfig, SpecRLOOConfig, PPOConfig):
        with pytest.raises(ValueError, match=r"WORLD_SIZE=2 processes .*of its own: set use_cpu=True"):
            config(str(tmp_path), bf16=False)
    with pytest.raises(ValueError, match="WORLD_SIZE=2"):
        make_trainer(config_class=GRPOConfig, use_cpu=False)


def test_every_honoured_option_arrives():
    given = GenerationConfig(
        max_new_tokens=9,
        do_sample=True,
        temperature=0.5,
        top_k=7,
        top_p=0.8,
        min_p=0.1,
        repetition_penalty=1.3,
        eos_token_id=[4, 2],
        stop_strings="end",
    )
    params = sampling_params(given, eos_token_ids=[2, 6])
    assert vars(params) == {
        "max_new_tokens": 9,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.8,
        "min_p": 0.1,
        "repetition_penalty": 1.3,
        "eos_token_ids": (2, 4, 6),
        "stop_strings": ("end",),
    }


def test_unset_options_come_from_the_policy_and_then_from_transformers():
    given = GenerationConfig(max_new_tokens=3, do_sample=True, top_p=1.0)
    own = GenerationConfig(top_p=0.3, min_p=0.2, eos_token_id=5, max_length=77)
    params = sampling_params(given, own)
    assert (params.top_p, params.min_p, params.top_k, params.eos_token_ids) == (1.0, 0.2, 50, (5,))


def test_what_the_checkpoint_sets_is_told_apart():
    given = GenerationConfig(max_new_tokens=3, do_sample=True, top_p=1.0, eos_token_id=[1])
    own = GenerationConfig(top_p=0.3, min_p=0.2, temperature=1.0, eos_token_id=5, stop_strings=["x"], typical_p=1.0)
    assert inherited(given, own) == {"min_p": 0.2, "stop_strings": ["x"]}
    assert inherited(given, None) == {}


@pytest.mark.parametrize("config_class", [SpecGRPOConfig, SpecRLOOConfig])
def test_the_log_says_what_comes_from_the_checkpoint(make_trainer, make_policy, caplog, config_class):
    trainer_class = {SpecGRPOConfig: SpecGRPOTrainer, SpecRLOOConfig: SpecRLOOTrainer}[config_class]
    policy = make_policy()
    policy.generation_config.min_p, policy.generation_config.eos_token_id = 0.25, [1, 7]
    policy.generation_config.temperature, policy.generation_config.top_k = 0.1, 3  # TRL overrules them

    def build(_, rewards, args, **arguments):
        return trainer_class(policy, rewards, args, **arguments)

    trainer = make_trainer(build, config_class)
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("spec_rollout")]
    assert (
        said == "Sampling follows these settings of the policy's generation_config too: min_p=0.25, eos_token_id=[7]."
    )
    params = trainer_params(trainer)
    assert (params.min_p, params.eos_token_ids, params.temperature, params.top_k) == (0.25, (1, 7), 1.0, 0)


def test_a_setting_of_the_checkpoint_that_cannot_be_honoured_is_refused_with_its_origin():
    own = GenerationConfig(no_repeat_ngram_size=3)
    with pytest.raises(ValueError, match=r"generation_config.no_repeat_ngram_size = None \(it came with the"):
        sampling_params(GenerationConfig(max_new_tokens=3, do_sample=True), own)


def test_greedy_reads_no_sampling_option():
    params = sampling_params(GenerationConfig(max_new_tokens=3, do_sample=False, top_k=5, temperature=0.5))
    assert params.greedy and params.top_k == 0


REFUSED = {
    "assistant_early_exit": 2,
    "bad_words_ids": [[3]],
    "begin_suppress_tokens": [1],
    "constraints": ["x"],
    "custom_generate": "somewhere",
    "dola_layers": "low",
    "encoder_repetition_penalty": 1.5,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "exponential_decay_length_penalty": (5, 1.1),
    "forced_eos_token_id": 1,
    "guidance_scale": 2.0,
    "logits_processor": [None],
    "max_length": 30,
    "max_time": 1.0,
    "min_length": 3,
    "min_new_tokens": 2,
    "no_repeat_ngram_size": 2,
    "num_beams": 2,
    "num_return_sequences": 2,
    "penalty_alpha": 0.5,
    "prompt_lookup_num_tokens": 2,
    "remove_invalid_values": True,
    "sequence_bias": [[[3], 1.0]],
    "suppress_tokens": [1],
    "token_healing": True,
    "top_h": 0.4,
    "typical_p": 0.9,
    "watermarking_config": {"bias": 1.0},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused(name):
    given = GenerationConfig(max_new_tokens=3, do_sample=True)
    odd = GenerationConfig(do_sample=True)
    setattr(odd, name, REFUSED[name])
    if hasattr(given, name) and name != "max_length":
        with pytest.raises(ValueError, match=name):
            sampling_params(given, odd)
    odd.max_new_tokens = 3
    with pytest.raises(ValueError, match=rf"{name}=.* cannot be honoured .*: "):
        sampling_params(odd)


def test_no_option_of_transformers_is_overlooked():
    """Set to something odd, an option of this transformers version is taken, known to be harmless, or refused."""
    from spec_rollout.training.sampling_params import HARMLESS, HONOURED, MOOT

    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert names >= HONOURED | MOOT
    for name in names - HONOURED - HARMLESS - MOOT:
        given = GenerationConfig(max_new_tokens=3)
        setattr(given, name, 123)
        with pytest.raises(ValueError, match=name):
            sampling_params(given)


@pytest.mark.parametrize(
    "harmless",
    [
        {"cache_implementation": "static"},
        {"disable_compile": True, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1},
        {"num_beams": 1, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "typical_p": 1.0, "token_healing": False},
    ],
)
def test_what_changes_no_token_is_accepted(harmless):
    expected = sampling_params(GenerationConfig(max_new_tokens=3, do_sample=True))
    assert sampling_params(GenerationConfig(max_new_tokens=3, do_sample=True, **harmless)) == expected


def test_an_unknown_entry_in_the_policys_file_means_nothing():
    own = GenerationConfig(chat_format="raw")
    assert sampling_params(GenerationConfig(max_new_tokens=3), own) == sampling_params(
        GenerationConfig(max_new_tokens=3)
    )


def test_a_completion_needs_a_bound():
    with pytest.raises(ValueError, match="max_new_tokens is not set"):
        sampling_params(GenerationConfig(do_sample=True))


def test_the_trainers_own_options_are_mapped(make_trainer, tokenizer):
    trainer = make_trainer(top_k=3, min_p=0.1, generation_kwargs={"top_p": 0.5, "stop_strings": ["ab"]})
    from spec_rollout.training.sampler import trainer_params

    params = trainer_params(trainer)
    assert (params.top_k, params.top_p, params.min_p, params.temperature) == (3, 0.5, 0.1, 1.0)
    assert (params.max_new_tokens, params.stop_strings) == (12, ("ab",))
    assert params.eos_token_ids == (tokenizer.eos_token_id,)
    completions, _ = trainer._generate_single_turn(tokenizer(["one"] * 40)["input_ids"], None, {}, 1)
    assert all("ab" not in tokenizer.decode(ids)[:-2] for ids in completions)
