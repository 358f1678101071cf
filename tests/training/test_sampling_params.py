"""Generation options: what each of them becomes, honoured or refused."""

from __future__ import annotations

import pytest
from transformers import GenerationConfig

from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer, SpecRLOOConfig, SpecRLOOTrainer
from spec_rollout.training.sampling_params import inherited, sampling_params, trainer_params

CPU = {"bf16": False, "use_cpu": True}


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
