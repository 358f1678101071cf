"""Attention over grouped keys computes what transformers' `sdpa` computes, on the keys and values as they lie."""

import pytest
import torch
from torch import nn
from transformers import Gemma2PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter
from spec_rollout.engine import attention, prefill
from spec_rollout.engine.attention import GROUPED_SDPA, grouped_sdpa
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.masks import causal_mask, is_triangle
from spec_rollout.engine.target import Target
from spec_rollout.records import SamplingParams
from tests.tiny import PROMPTS, assert_same, policy, reference

PARAMS = SamplingParams(max_new_tokens=12)
ROWS, SHARED, SIZE, EXTENT = 3, 2, 8, 64


def tensors(groups: int, width: int, window: int | None = None, dtype: torch.dtype = torch.float32):
    """A layer, queries, keys and values as the slot cache returns them, and the mask of ragged rows."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Module().eval()
    layer.num_key_value_groups = groups
    query = torch.randn(ROWS, width, groups * SHARED, SIZE, generator=generator, dtype=dtype).transpose(1, 2)
    slots = torch.randn(2, ROWS + 1, EXTENT + 32, SHARED, SIZE, generator=generator, dtype=dtype)
    key, value = slots[:, :ROWS, :EXTENT].transpose(2, 3)
    positions = torch.tensor([[40], [0], [7]]) + torch.arange(width)
    return layer, query, key, value, causal_mask(positions, EXTENT, window)


@pytest.fixture
def calls(monkeypatch):
    """(queries, keys) of every call of torch's attention; its output lies as CUDA kernels leave it, [N, T, H, D]."""
    found, honest = [], nn.functional.scaled_dot_product_attention

    def recorded(query, key, *args, **kwargs):
        found.append((query, key))
        return honest(query, key, *args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", recorded)
    return found


@pytest.mark.parametrize("groups", [2, 7])
@pytest.mark.parametrize("width", [1, 2, 8])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("form", ["boolean", "additive", "one for all rows"])
def test_the_same_as_repeated_keys(groups, width, window, form, calls):
    layer, query, key, value, mask = tensors(groups, width, window)
    if form == "additive":
        mask = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
    elif form != "boolean":
        mask = mask[:1]
    expected, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.3)
    calls.clear()
    output, weights = grouped_sdpa(layer, query, key, value, mask, scaling=0.3)
    assert weights is None and output.shape == expected.shape and output.is_contiguous()
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)
    [(folded, taken)] = calls
    assert folded.shape == (ROWS, SHARED, groups * width, SIZE)
    assert taken is key


@pytest.mark.parametrize("case", ["heads are not grouped", "no mask", "masks per head", "position bias", "wide"])
def test_what_is_left_to_sdpa(case):
    """The same to the last bit, and reached through transformers' own function."""
    groups, width = (1 if case == "heads are not grouped" else 2), (2 * SHARED * SIZE + 1 if case == "wide" else 3)
    layer, query, key, value, mask = tensors(groups, width)
    options = {"position_bias": torch.randn(1, 4, width, EXTENT)} if case == "position bias" else {}
    if case == "no mask":
        mask = None
    elif case == "masks per head":
        mask = mask.repeat(1, 4, 1, 1)
        mask[:, ::2, :, 1:] = False
    expected, _ = sdpa_attention_forward(layer, query, key, value, mask, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "sdpa_attention_forward", lambda *args, **kwargs: "sdpa")
        assert grouped_sdpa(layer, query, key, value, mask, **options) == "sdpa"
    assert torch.equal(grouped_sdpa(layer, query, key, value, mask, **options)[0], expected)


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("width", [1, 2, 40])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_tokens_need_no_mask(groups, width, window, dtype, monkeypatch):
    """Masked or not, the same to the last bit on a CPU."""
    layer, query, key, value, _ = tensors(groups, width, dtype=dtype)
    places = torch.arange(width).expand(ROWS, -1)
    plain, known = causal_mask(places, EXTENT, window), causal_mask(places, EXTENT, window, first=True)
    assert is_triangle(known) and torch.equal(plain, known)
    assert not any(map(is_triangle, (plain, known[:1], known.clone(), None)))
    assert not is_triangle(causal_mask(places, EXTENT, width - 1, first=True))
    expected, _ = sdpa_attention_forward(layer, query, key, value, plain, scaling=0.3)
    given, honest = [], nn.functional.scaled_dot_product_attention

    def recorded(query, key, *args, **kwargs):
        given.append((kwargs.get("attn_mask"), key.shape[2]))
        return honest(query, key, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", recorded)
    output, _ = grouped_sdpa(layer, query, key, value, known, scaling=0.3)
    if width > 1 or dtype != torch.float32:  # a kernel of its own takes a single query
        assert torch.equal(output, expected)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)
    assert given == [(None, EXTENT)]


def test_which_passes_need_none(monkeypatch):
    """Those over the first tokens of prompts, of all rows in the pass, in every layer; and no other."""
    monkeypatch.setattr(prefill, "PREFILL_TOKENS", 16)
    model = policy("llama")
    prompts = [list(range(1, 41)), [5, 6, 7], list(range(3, 12))]
    expected = reference(model, prompts, PARAMS)
    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=3), drafter=OracleDrafter(expected))
    engine.generate(prompts, PARAMS)  # is probed
    seen, honest = [], attention.is_triangle

    def recorded(mask):
        if mask.shape[2] > 5:
            seen.append((mask.shape[0], mask.shape[2], honest(mask), bool(mask[..., 0, 1:].any())))
        return honest(mask)

    monkeypatch.setattr(attention, "is_triangle", recorded)
    assert_same(engine.generate(prompts, PARAMS), expected)
    layers = model.config.num_hidden_layers
    assert seen[:layers] == [(1, 16, True, False)] * layers
    assert len(seen) > 2 * layers and all(first != others for _, _, first, others in seen)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("llama", GROUPED_SDPA),
        ("gemma3_text", GROUPED_SDPA),
        # Its soft cap is nothing that `sdpa` computes: older transformers run it without, newer ones `eager`.
        ("gemma2", GROUPED_SDPA if Gemma2PreTrainedModel._supports_sdpa else "eager"),
        ("gpt2", GROUPED_SDPA),  # one head of keys for each of queries, but prompts without a mask
        ("stablelm", "sdpa"),  # its attention cannot be replaced
        ("gpt_oss", "eager"),  # its sinks need the weights
    ],
)
def test_which_models_take_it(name, implementation):
    model = policy(name)
    before = model.config._attn_implementation
    with Target(model).rollout():
        assert model.config._attn_implementation == implementation
    assert model.config._attn_implementation == before != GROUPED_SDPA


def test_a_rollout_reads_the_cache_as_it_lies(calls):
    """Every pass of the decode loop attends to the cache's own memory, never to a copy of it."""
    model = policy("llama")
    expected = reference(model, PROMPTS, PARAMS)
    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=3), drafter=OracleDrafter(expected))
    engine.generate(PROMPTS, PARAMS)  # is probed
    calls.clear()
    lies = set()
    engine.progress = lambda *_: lies.update(layer.data_ptr() for layer in engine.cache.keys)
    assert_same(engine.generate(PROMPTS, PARAMS), expected)
    assert engine.stats.mean_acceptance_length > 3
    decoding = [(q, k) for q, k in calls if q.shape[2] == 2 * 4]  # two query heads a key, four tokens a pass
    assert len(decoding) > 4 and all(k.data_ptr() in lies and k.shape[1] == 2 for _, k in decoding)
