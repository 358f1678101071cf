"""The probe lets through what decodes ragged rows as it reads whole sequences, and nothing else."""

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from spec_rollout import UnsupportedModelError
from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter
from spec_rollout.engine import masks, probe
from spec_rollout.engine.attention import GROUPED_SDPA
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.engine.masks import causal_mask
from spec_rollout.engine.target import Target
from spec_rollout.records import SamplingParams
from tests.tiny import PROMPTS, assert_same, make_policy, policy, reference
from tests.tiny_configs import ARCHITECTURES, HYBRIDS

PARAMS = SamplingParams(max_new_tokens=12)


def refused(model, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        RolloutEngine(model, SpecConfig(num_speculative_tokens=0)).generate(PROMPTS, PARAMS)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *HYBRIDS])
def test_the_bound_is_many_times_the_rounding(name):
    found = Target(policy(name))
    with probe.narrow_windows(found.model), found.rollout():
        for stride in probe.STRIDES[:1]:
            tried = probe.Probe(found, stride)
            bound = probe.BOUNDS[torch.float32] / (2 if found.recurrent else 4)
            assert tried.error(tried.expected()) < bound


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bart", {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "d_model": 32}),
        ("marian", {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "d_model": 32}),
        ("mvp", {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "d_model": 32}),
    ],
)
def test_decoders_that_count_positions_by_themselves(name, options):
    """At a small scale of weights their log-probs are off by a few hundredths."""
    model = make_policy(name, std=0.05, is_decoder=True, is_encoder_decoder=False, **options)
    refused(model, "differ by .* standard deviations .bound 0.0001.")


def mask_without_window(positions, extent, window=None, first=False):
    return causal_mask(positions, extent)


def mask_one_too_narrow(positions, extent, window=None, first=False):
    return causal_mask(positions, extent, None if window is None else window - 1)


@pytest.mark.parametrize("mask", [mask_without_window, mask_one_too_narrow])
@pytest.mark.parametrize("window", [8, 40])
def test_windows_are_probed_however_wide(mask, window, monkeypatch):
    """A window of 40 tokens lies beyond the probe; it is narrowed for it and put back."""
    model = make_policy("mistral", sliding_window=window)
    monkeypatch.setattr(masks, "causal_mask", mask)
    refused(model, "differ by")
    assert model.config.sliding_window == window


def test_windows_are_left_as_they_were():
    model = make_policy("gemma3_text", sliding_window=9)
    before = [(m, m.__dict__["sliding_window"]) for m in model.modules() if "sliding_window" in m.__dict__]
    with probe.narrow_windows(model):
        assert model.config.sliding_window == probe.WINDOW
    assert model.config.sliding_window == 9 and before == [(m, m.sliding_window) for m, _ in before]


def no_move(self, source, target, extent):
    pass


def shifted_after_a_rejection(honest):
    """Rejected guesses stay: the next pass is written behind them."""

    def window(self, start, positions, extent, lengths=None):
        if positions.shape[1] == 1 and extent > 3:
            positions = positions + 1
        return honest(self, start, positions, extent, lengths)

    return window


@pytest.mark.parametrize("breakage", ["move", "rejection"])
def test_moves_and_rejected_guesses_are_probed(breakage, monkeypatch):
    if breakage == "move":
        monkeypatch.setattr(SlotCache, "copy", no_move)
    else:
        monkeypatch.setattr(SlotCache, "window", shifted_after_a_rejection(SlotCache.window))
    refused(make_policy("llama"), "does not decode ragged rows")


CAPPED = "exact_with_softcap"


def capped(module: nn.Module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    """What flex and flash attention do with a policy's soft cap of attention scores, which sdpa leaves out."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(CAPPED, capped)
AttentionMaskInterface.register(CAPPED, eager_mask)


@pytest.mark.parametrize(
    ("name", "options", "taken"),
    [("gemma2", {"attn_logit_softcapping": 0.5}, "eager"), ("llama", {}, GROUPED_SDPA)],
)
def test_what_replaces_the_policys_attention_does_what_it_did(name, options, taken):
    """A soft cap of scores is dropped by sdpa: with one, a policy on flex or flash attention is decoded by `eager`."""
    model = make_policy(name, **options)
    model.config._attn_implementation = CAPPED
    expected = reference(model, PROMPTS, PARAMS)
    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=3), drafter=OracleDrafter(expected))
    assert_same(engine.generate(PROMPTS, PARAMS), expected)
    with engine.target.rollout():
        assert model.config._attn_implementation == taken


def test_another_attention_is_proven_anew():
    model = make_policy("gemma2", attn_logit_softcapping=0.5)
    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=0))
    for attention in (CAPPED, "eager", CAPPED):
        model.config._attn_implementation = attention
        assert_same(engine.generate(PROMPTS, PARAMS), reference(model, PROMPTS, PARAMS))


def test_an_attention_of_which_none_is_a_match():
    model = make_policy("llama")
    name = "louder"
    AttentionInterface.register(name, lambda module, q, *args, **kwargs: capped(module, 3 * q, *args, **kwargs))
    AttentionMaskInterface.register(name, eager_mask)
    model.config._attn_implementation = name
    refused(model, "differ by .* standard deviations")
    assert model.config._attn_implementation == name


def not_here(*_, **__):
    raise ImportError("no kernels for this device")


def test_an_attention_that_cannot_run():
    model = make_policy("llama")
    AttentionInterface.register("absent", not_here)
    AttentionMaskInterface.register("absent", eager_mask)
    model.config._attn_implementation = "absent"
    refused(
        model, "cannot read a sequence of 24 tokens with its own attn_implementation='absent': ImportError.*'eager'"
    )


def test_masked_vocabularies_are_decoded():
    """Logits of -inf, as a policy gives that masks a part of its vocabulary."""
    model = make_policy("llama")
    model.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor([3, 5]), -torch.inf))
    expected = reference(model, PROMPTS, PARAMS)
    assert_same(RolloutEngine(model, SpecConfig(num_speculative_tokens=0)).generate(PROMPTS, PARAMS), expected)


def one_position_is_blind(positions, extent, window=None, first=False):
    """To the first token, in all layers."""
    mask = causal_mask(positions, extent, window)
    mask[..., 0] &= (positions != 9)[:, None]
    return mask


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_wrong_position_shows_in_few_digits_too(dtype, monkeypatch):
    monkeypatch.setattr(masks, "causal_mask", one_position_is_blind)
    refused(make_policy("llama", dtype), "does not decode ragged rows")
