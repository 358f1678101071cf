"""Nothing silent and nothing lost: bad input is refused before anything runs, a broken drafter is switched off."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from spec_rollout import UnsupportedModelError
from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import RandomDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import SamplingParams
from tests.tiny import PROMPTS, VOCAB, Scripted, make_policy, policy
from tests.tiny_configs import SIZES

pytestmark = pytest.mark.any_device

PARAMS = SamplingParams(max_new_tokens=16)


def refused(match: str, prompts=PROMPTS, params=PARAMS, error=ValueError, **options) -> None:
    """The call raises, and not one forward pass has run."""
    model = make_policy("llama")
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(error, match=match):
        RolloutEngine(model, SpecConfig(num_speculative_tokens=0)).generate(prompts, params, **options)
    assert not ran


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        ([[1], [], [2]], "Prompt 1 is empty.*at least 1 token"),
        ([[1], [2, VOCAB]], f"Prompt 1 has token id {VOCAB}, outside the vocabulary of {VOCAB} tokens.*tokenizer"),
        ([[-1]], "Prompt 0 has token id -1, outside the vocabulary"),
        ([[1], [2], [3] * 81], "Prompt 2 has 81 tokens; with max_new_tokens=16 it exceeds.*96 tokens.*lower.*to 15"),
        ([[1], [1.7, 2.9]], "Prompt 1 has 1.7 among its token ids: they must be integers"),
        ([[1, True]], "Prompt 0 has True among its token ids"),
        ([["1"]], "Prompt 0 has '1' among its token ids"),
        ([[3] * 200], "Prompt 0 has 200 tokens.*shorten the prompt or lower max_new_tokens to 0"),
    ],
)
def test_prompts(prompts, match):
    refused(match, prompts)


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        ([16] * 6, "max_new_tokens has 6 entries for 7 prompts"),
        ([16] * 6 + [0], "max_new_tokens=0 of prompt 6 is out of range: it must be at least 1"),
        ([16] * 6 + [2.5], "max_new_tokens=2.5 of prompt 6 is of the wrong type: it must be an integer"),
        ([16] * 6 + [94], "Prompt 6 has 3 tokens; with max_new_tokens=94 it exceeds"),
    ],
)
def test_limits(limits, match):
    refused(match, max_new_tokens=limits)


def test_the_context_can_be_filled_to_the_last_token():
    got = RolloutEngine(policy("llama"), SpecConfig(num_speculative_tokens=0)).generate([[3] * 80], PARAMS)
    assert len(got[0].token_ids) == 16


@pytest.mark.parametrize("eos", [VOCAB, -1])
def test_eos(eos):
    refused(
        rf"eos_token_ids \[{eos}\] are outside the vocabulary",
        params=SamplingParams(max_new_tokens=9, eos_token_ids=(3, eos)),
    )


def test_seed():
    refused("non-negative", seed=(1, -2))


def test_stop_strings_without_tokenizer():
    engine = RolloutEngine(policy("llama"), SpecConfig(num_speculative_tokens=0))
    with pytest.raises(ValueError, match="stop_strings=.'a',. need a tokenizer.*give the engine its `tokenizer`"):
        engine.generate(PROMPTS, SamplingParams(max_new_tokens=9, stop_strings=("a",)))


def test_stop_strings_as_one_string():
    with pytest.raises(ValueError, match="stop_strings='abc' is one string.*tuple"):
        SamplingParams(max_new_tokens=9, stop_strings="abc")


def test_an_output_head_of_another_width():
    """More logits than the vocabulary has ids, or fewer."""
    for width in (VOCAB + 31, VOCAB - 1):
        model = make_policy("llama")
        model.lm_head = torch.nn.Linear(32, width, bias=False, device=model.device)
        with pytest.raises(ValueError, match=f"LlamaForCausalLM gives {width} logits where .*vocab_size is 97"):
            RolloutEngine(model, SpecConfig(num_speculative_tokens=0)).generate(PROMPTS, PARAMS)


def test_a_drafter_that_nobody_asks():
    with pytest.raises(ValueError, match="drafter without a controller needs num_speculative_tokens"):
        RolloutEngine(policy("llama"), drafter=RandomDrafter())


@pytest.mark.parametrize("gamma", [-1, 8, 100])
def test_controller_out_of_range(gamma):
    """Guesses beyond the room that the slots have would reach into the next slot."""
    engine = RolloutEngine(policy("llama"), drafter=RandomDrafter(), controller=Scripted(gamma))
    with pytest.raises(ValueError, match=f"num_speculative_tokens={gamma}.*0 to 7.*max_num_speculative_tokens"):
        engine.generate(PROMPTS, PARAMS)


def test_partitioned_weights():
    """As under ZeRO-3, where an ungathered parameter is empty."""
    model = make_policy("llama")
    model.get_input_embeddings().weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match="partitioned .ZeRO-3. and not gathered.*ds3_gather_for_generation"):
        RolloutEngine(model, SpecConfig(num_speculative_tokens=0)).generate(PROMPTS, PARAMS)


@pytest.mark.parametrize(
    ("name", "options", "cause"),
    [
        ("mamba", {}, "'linear_attention'"),  # of the first kind, which no seam leads to
        ("minimax", {"layer_types": ["linear_attention", "full_attention"]}, "'linear_attention'"),
        ("rwkv", {}, "recurrent state"),
        ("llama4_text", {"max_position_embeddings": 8192}, "attn_temperature_tuning.*below 8192"),
    ],
)
def test_layers_without_a_maskable_state(name, options, cause):
    """Refused by name of the layer type when the engine is made; what would be taken is said."""
    model = make_policy(name, **options)
    with pytest.raises(UnsupportedModelError, match=rf"{type(model).__name__}.*{cause}.*TRL's own trainer.*Mamba-2"):
        RolloutEngine(model)


def test_recurrent_layers_are_not_compiled():
    with pytest.raises(ValueError, match="compile_passes=True: Lfm2ForCausalLM .*Set compile_passes=False"):
        RolloutEngine(make_policy("lfm2"), SpecConfig(compile_passes=True))


@pytest.mark.parametrize(
    ("name", "options", "cause"),
    [
        ("bloom", {"n_head": 4, "n_layer": 2}, "cannot decode ragged rows: ValueError"),
        ("falcon", {"alibi": True}, "cannot decode ragged rows"),
        ("bert", {"std": 0.2}, "differ by .* standard deviations"),
        # local attention that counts back from the end of the cache: wrong only where that is beyond its window
        (
            "gpt_neo",
            {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 40},
            "differ by .* standard deviations",
        ),
    ],
)
def test_models_that_fail_the_probe(name, options, cause):
    """Refused before a token is sampled, and left as found."""
    model = make_policy(name, **options).train()
    with pytest.raises(UnsupportedModelError, match=f"{type(model).__name__}.*{cause}.*TRL's own trainer"):
        RolloutEngine(model, SpecConfig(num_speculative_tokens=0)).generate(PROMPTS, PARAMS)
    assert model.training


def test_encoder_decoder():
    config = AutoConfig.for_model("t5", **SIZES, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder; only causal language models"):
        RolloutEngine(AutoModelForSeq2SeqLM.from_config(config))
