"""PEFT's prompt, prefix and p-tuning: the tokens are those that the policy's own forward passes give one by one."""

from __future__ import annotations

import pytest
import torch
from peft import (
    CPTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen2Config

from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.virtual_tokens import virtual_tokens
from spec_rollout.records import SamplingParams, UnsupportedModelError
from tests.engine.test_rope import PHI
from tests.tiny import make_policy

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.3}
MODELS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "gemma2": Gemma2Config(
        **(SMALL | {"num_key_value_heads": 4}), head_dim=8, sliding_window=8, tie_word_embeddings=False
    ),
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=96, initializer_range=0.3),
}
TUNINGS = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "projected prefix": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16
    ),
    "p": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
}
PROMPTS = [[3, 5, 7], [2], [3, 5, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 11, 12]]
GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)


def tuned(model: str, tuning: str):
    torch.manual_seed(0)
    config = MODELS[model]
    policy = get_peft_model(AutoModelForCausalLM.from_config(config), TUNINGS[tuning])
    with torch.no_grad():
        for weight in policy.prompt_encoder.parameters():
            weight.normal_(std=0.7)
    return policy


LIMITS = [12, 5, 9, 12]
"""New tokens of each prompt: rows end at different times, so that others move into their slots."""


def one_by_one(policy, prompt: list[int], number: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probs by whole forward passes of PEFT's own."""
    policy.eval()
    ids, logprobs = list(prompt), []
    with torch.no_grad():
        for _ in range(number):
            scores = policy(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
            ids.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
    return ids[len(prompt) :], logprobs


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("model", MODELS)
def test_greedy_tokens_are_the_policys_own(model, tuning):
    policy = tuned(model, tuning)
    expected = [one_by_one(policy, prompt, limit) for prompt, limit in zip(PROMPTS, LIMITS, strict=True)]
    with policy.disable_adapter():
        bare = [one_by_one(policy, prompt, limit)[0] for prompt, limit in zip(PROMPTS, LIMITS, strict=True)]
    assert bare != [ids for ids, _ in expected]  # the virtual tokens matter
    policy.train()
    engine = RolloutEngine(policy, SpecConfig(max_slots=3, num_speculative_tokens=0))
    plain = engine.generate(PROMPTS, GREEDY, max_new_tokens=LIMITS)
    oracle = RolloutEngine(policy, SpecConfig(max_slots=3, num_speculative_tokens=3), drafter=OracleDrafter(plain))
    for completions in (plain, oracle.generate(PROMPTS, GREEDY, max_new_tokens=LIMITS)):
        assert [c.token_ids for c in completions] == [ids for ids, _ in expected]
        for completion, (_, logprobs) in zip(completions, expected, strict=True):
            assert completion.logprobs == pytest.approx(logprobs, abs=1e-4)
    assert oracle.stats.mean_acceptance_length > 2
    assert policy.training and policy.prompt_encoder.training


@pytest.mark.parametrize("tuning", TUNINGS)
def test_samples_follow_weights_that_move(tuning):
    """The prefix is read anew in each rollout, also where the cache is kept."""
    policy = tuned("llama", tuning)
    params = SamplingParams(max_new_tokens=12)
    engine = RolloutEngine(policy, SpecConfig(max_slots=3, num_speculative_tokens=0))
    before = engine.generate(PROMPTS, params)
    with torch.no_grad():
        for weight in policy.prompt_encoder.parameters():
            weight.normal_(std=0.7)
    after = engine.generate(PROMPTS, params)
    fresh = RolloutEngine(policy, SpecConfig(max_slots=4, num_speculative_tokens=0)).generate(PROMPTS, params)
    assert [c.token_ids for c in after] == [c.token_ids for c in fresh] != [c.token_ids for c in before]


def test_virtual_tokens_take_their_part_of_the_context():
    policy = tuned("gpt2", "prompt")
    engine = RolloutEngine(policy, SpecConfig(num_speculative_tokens=3))
    (completion,) = engine.generate([[7] * 79], SamplingParams(max_new_tokens=12, temperature=0.0))
    assert completion.token_ids == one_by_one(policy, [7] * 79, 12)[0]
    with pytest.raises(ValueError, match="Prompt 0 has 80 tokens; with max_new_tokens=12 .* 91 tokens"):
        engine.generate([[7] * 80], SamplingParams(max_new_tokens=12))


def test_what_needs_more_than_a_prefix_is_refused():
    config = CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=[1, 2, 3],
        cpt_mask=[1, 1, 1],
        cpt_tokens_type_mask=[1, 2, 3],
    )
    torch.manual_seed(0)
    policy = get_peft_model(AutoModelForCausalLM.from_config(MODELS["llama"]), config)
    with pytest.raises(UnsupportedModelError, match="CPT cannot be decoded .*PREFIX_TUNING, PROMPT_TUNING, P_TUNING"):
        RolloutEngine(policy)
    with pytest.raises(ValueError, match="compile_passes=True cannot be honoured for PEFT's PROMPT_TUNING"):
        RolloutEngine(tuned("llama", "prompt"), SpecConfig(compile_passes=True))


@pytest.mark.parametrize(("name", "options", "cause"), [("lfm2", {}, "recurrent layers"), ("phi3", PHI, "longrope")])
def test_what_a_prefix_is_not_decoded_with_is_refused(name, options, cause):
    policy = get_peft_model(make_policy(name, **options), TUNINGS["prompt"])
    with pytest.raises(UnsupportedModelError, match=f"{cause}.*adapters such as LoRA"):
        RolloutEngine(policy)


def test_other_policies_have_none():
    assert virtual_tokens(tuned("llama", "prompt")) == 5
    assert virtual_tokens(AutoModelForCausalLM.from_config(MODELS["llama"])) == 0
