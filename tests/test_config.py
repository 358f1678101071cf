"""Options and sampling parameters: what is out of range is refused by name, bound and remedy."""

import dataclasses
import re

import pytest

from spec_rollout import SamplingParams, SpecConfig


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("num_speculative_tokens", -1, "0 for plain decoding"),
        ("max_num_speculative_tokens", 0, "at least 1"),
        ("max_num_speculative_tokens", -3, "at least 1"),
        ("max_slots", 0, "at least 1"),
        ("max_cache_gib", 0.0, "above 0"),
        ("max_cache_gib", float("nan"), "above 0"),
        ("max_cache_gib", 2e6, "at most 1000000"),
        ("draft_learning_rate", 0.0, "above 0"),
        ("draft_learning_rate", float("nan"), "above 0"),
        ("max_feature_tokens", -1, "0 or more"),
        ("draft_overhead", 0.0, "above 0"),
    ],
)
def test_config_out_of_range(option, value, remedy):
    with pytest.raises(ValueError, match=rf"{option}={value}.*{remedy}"):
        SpecConfig(**{option: value})


def test_an_unknown_verification():
    with pytest.raises(ValueError, match="verification='strict' is unknown: give 'coupled'"):
        SpecConfig(verification="strict")


def test_a_head_that_never_learns_must_come_from_somewhere():
    with pytest.raises(ValueError, match="draft_refresh=False without draft_model_path"):
        SpecConfig(draft_refresh=False, draft_ngrams=False)
    with pytest.raises(ValueError, match="on vLLM"):
        SpecConfig(draft_refresh=False, rollout_backend="vllm")
    with pytest.raises(ValueError, match="profile_rollouts=True needs rollout_backend='embedded'"):
        SpecConfig(profile_rollouts=True, rollout_backend="vllm")
    with pytest.raises(ValueError, match="compile_passes=True needs rollout_backend='embedded'"):
        SpecConfig(compile_passes=True, rollout_backend="vllm")
    with pytest.raises(ValueError, match="max_cache_gib=2 needs rollout_backend='embedded'"):
        SpecConfig(max_cache_gib=2, rollout_backend="vllm")
    SpecConfig(draft_refresh=False)
    SpecConfig(draft_refresh=False, draft_model_path="head")
    SpecConfig(draft_refresh=False, num_speculative_tokens=0)


@pytest.mark.parametrize("option", ["gamma", "num_speculative_token", "verification_mode"])
def test_unknown_option(option):
    with pytest.raises(TypeError, match=option):
        SpecConfig(**{option: 1})


@pytest.mark.parametrize(("fixed", "bound", "widest"), [(None, 7, 7), (None, 3, 3), (0, 7, 0), (5, 3, 5)])
def test_widest(fixed, bound, widest):
    assert SpecConfig(num_speculative_tokens=fixed, max_num_speculative_tokens=bound).widest == widest


def test_every_option_says_what_it_does():
    assert all(field.metadata.get("help") for field in dataclasses.fields(SpecConfig))


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("max_new_tokens", 0, "at least 1"),
        ("temperature", -0.1, "0 .greedy. or more"),
        ("temperature", float("nan"), "0 .greedy. or more"),
        ("top_k", -1, "0 .off. or more"),
        ("top_p", 0.0, "in .0, 1."),
        ("top_p", 1.01, "in .0, 1."),
        ("top_p", float("nan"), "in .0, 1."),
        ("min_p", -0.5, "in .0, 1."),
        ("min_p", 1.5, "in .0, 1."),
        ("repetition_penalty", 0.0, "above 0"),
        ("repetition_penalty", -1.0, "above 0"),
    ],
)
def test_params_out_of_range(name, value, bound):
    with pytest.raises(ValueError, match=rf"{name}={value} is out of range: it must be {bound}"):
        SamplingParams(**{name: value})


def test_unknown_sampling_option_is_never_ignored():
    with pytest.raises(TypeError, match="no_repeat_ngram_size"):
        SamplingParams(no_repeat_ngram_size=2)


def test_edges_are_in_range():
    params = SamplingParams(max_new_tokens=1, temperature=0, top_k=0, top_p=1.0, min_p=1.0, repetition_penalty=0.1)
    assert params.greedy and not SamplingParams().greedy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_slots", float("inf")),
        ("max_slots", 2.5),
        ("max_slots", "64"),
        ("max_slots", True),
        ("num_speculative_tokens", 2.5),
        ("num_speculative_tokens", "3"),
        ("max_num_speculative_tokens", None),
        ("draft_refresh", "no"),
        ("draft_overhead", "0.05"),
        ("draft_learning_rate", "1e-4"),
        ("max_feature_tokens", 1e9),
        ("verification", 1),
        ("draft_ngrams", 1),
    ],
)
def test_config_of_the_wrong_type(name, value):
    with pytest.raises(ValueError, match=rf"^{name}={re.escape(repr(value))} is of the wrong type: it must be "):
        SpecConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 8.0),
        ("max_new_tokens", "8"),
        ("temperature", "1"),
        ("temperature", None),
        ("top_k", 5.5),
        ("eos_token_ids", (5.5,)),
        ("eos_token_ids", 5),
        ("eos_token_ids", ("</s>",)),
        ("stop_strings", (5,)),
    ],
)
def test_params_of_the_wrong_type(name, value):
    with pytest.raises(ValueError, match=rf"^{name}={re.escape(repr(value))} is of the wrong type: it must be "):
        SamplingParams(**{name: value})


def test_params_that_stop_at_nothing():
    with pytest.raises(ValueError, match="stop_strings=.* must be strings of at least one character"):
        SamplingParams(stop_strings=("a", ""))


def test_whole_numbers_and_lists_are_taken():
    assert SamplingParams(temperature=1, top_p=1, eos_token_ids=[3], stop_strings=["a"]).eos_token_ids == (3,)
    assert SpecConfig(draft_overhead=1, draft_learning_rate=1).draft_overhead == 1


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty"])
def test_infinite_params(name):
    with pytest.raises(ValueError, match=f"{name}=inf is out of range: it must be .*finite"):
        SamplingParams(**{name: float("inf")})
