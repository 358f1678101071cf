"""The lean pass: which policies take it, that it is theirs, on live weights, and in few operations."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.engine.lean import choice, lean_pass, products
from spec_rollout.engine.lean.lean_pass import LeanPass
from spec_rollout.engine.target import Target
from spec_rollout.records import SamplingParams
from tests.tiny import PROMPTS, VOCAB, Scripted, assert_same, make_policy, reference

PARAMS = SamplingParams(max_new_tokens=16)
VARIANTS = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "mistral": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 3.0,
        "attention_multiplier": 0.2,
    },
    "phi3": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {"attn_logit_softcapping": None, "final_logit_softcapping": 5.0},
    "gemma3_text": {},
}


def rough(name: str, dtype: torch.dtype = torch.float32, **overrides):
    """A policy in which no weight, of norms and biases neither, is what it is at the start of a training."""
    model = make_policy(name, dtype, **{**VARIANTS.get(name, {}), **overrides})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def both_ways(model) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """(logits, hidden states) of the same ragged passes through the model's own forward and through the lean pass."""
    policy = Target(model)
    found = []
    with policy.rollout():
        assert policy.path == "lean"
        lean = policy._lean
        for policy._lean in (None, lean):
            cache = SlotCache()
            cache.allocate(5, 64, (policy.dtype, policy.device))
            ids = torch.arange(4 * 40).view(4, 40) * 7 % VOCAB
            policy.forward(cache, (0, 4), ids[:, :20], torch.arange(20).expand(4, -1), 20, keep_logits=1)
            start, outputs = torch.tensor([[19], [3], [12], [8]]), []
            for width, extent in ((1, 32), (4, 32), (3, 64)):
                place = start + torch.arange(width)
                outputs.append(policy.forward(cache, (0, 4), ids.gather(1, place), place, extent))
                start += width - 1
            found.append(outputs)
    return found


@pytest.mark.parametrize("columns", [False, True], indirect=True)
@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_the_policy_in_float32(name, columns):
    for (logits, hidden), (own_logits, own_hidden) in zip(*reversed(both_ways(rough(name))), strict=True):
        assert (logits - own_logits).abs().max() < 1e-5 * own_logits.std()
        assert len(hidden) == len(own_hidden) == 3
        for mine, own in zip(hidden, own_hidden, strict=True):
            torch.testing.assert_close(mine, own, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 24,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_ropes(rope):
    model = rough("llama", rope_parameters={"rope_theta": 10000.0, **rope})
    for (logits, _), (own_logits, _) in zip(*reversed(both_ways(model)), strict=True):
        assert (logits - own_logits).abs().max() < 1e-5 * own_logits.std()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VARIANTS)
def test_it_rounds_as_the_policy_in_half_precision(name, dtype):
    """To the bit where a row of a product does not depend on the number of rows, as on most CPUs; else as near as two
    of the policy's own passes are."""
    model = rough(name, dtype)
    if model.config._attn_implementation == "eager":  # as gemma2 from transformers 5.24 on: another kernel rounds
        pytest.skip("its own attention is not the one of the lean pass")
    own, lean = both_ways(model)
    with torch.no_grad():
        whole = model(input_ids=torch.arange(4 * 40).view(4, 40) * 7 % VOCAB).logits
    noise = max((whole[row, at] - own[0][0][row, 0]).abs().max() for row, at in enumerate((19, 3, 12, 8)))
    for (logits, hidden), (own_logits, own_hidden) in zip(lean, own, strict=True):
        assert (logits - own_logits).abs().max() <= 2 * noise
        assert noise > 0 or all(torch.equal(a, b) for a, b in zip(hidden, own_hidden, strict=True))


@pytest.mark.parametrize("columns", [False, True], indirect=True)
@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_are_the_same_when_it_comes_and_goes(name, columns, monkeypatch):
    model = rough(name)
    expected = reference(model, PROMPTS, PARAMS)
    engine = RolloutEngine(
        model, SpecConfig(max_slots=3), drafter=OracleDrafter(expected), controller=Scripted(3, 0, 7, 1)
    )
    taken, forward = [], Target.forward

    def in_turns(self, *given, **options):
        lean = self._lean
        self._lean = lean if len(taken) % 3 else None
        taken.append(self.path)
        found = forward(self, *given, **options)
        self._lean = lean
        return found

    monkeypatch.setattr(Target, "forward", in_turns)
    assert_same(engine.generate(PROMPTS, PARAMS), expected)
    assert {"lean", "transformers"} == set(taken) and engine.stats.mean_acceptance_length > 2


def test_an_optimiser_step_is_seen_at_once():
    model = rough("qwen3")
    engine = RolloutEngine(model)
    first = engine.generate(PROMPTS, PARAMS)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    model(input_ids=torch.arange(40)[None], labels=torch.arange(40)[None]).loss.backward()
    optimiser.step()
    second = engine.generate(PROMPTS, PARAMS)
    assert [c.token_ids for c in first] != [c.token_ids for c in second]
    assert_same(second, reference(model, PROMPTS, PARAMS))


def stale_weights(patch):
    """The first rollout's weights, norms and all, for ever."""
    kept = {}

    def once(model, family):
        return kept.setdefault(id(model), LeanPass(model, family))

    patch.setattr(choice, "LeanPass", once)


def row_off_by_one(patch):
    honest = lean_pass.index_of
    patch.setattr(lean_pass, "index_of", lambda cache, positions: honest(cache, positions.roll(1, 0)))


@pytest.mark.parametrize("columns", [False, True], indirect=True)
@pytest.mark.parametrize("mutation", [stale_weights, row_off_by_one])
def test_a_mutation_is_noticed(mutation, columns, monkeypatch):
    model = rough("qwen3")
    engine = RolloutEngine(model)
    engine.generate(PROMPTS, PARAMS)  # proven before the mutation
    mutation(monkeypatch)
    engine.generate(PROMPTS, PARAMS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # the scales of norms are copied at each rollout
                parameter.mul_(1.5)
    got = engine.generate(PROMPTS, PARAMS)
    assert [c.token_ids for c in got] != [c.token_ids for c in reference(model, PROMPTS, PARAMS)]


class Counting(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("columns", [False, True], indirect=True)
def test_a_pass_dispatches_few_operations(columns):
    """Views included; transformers' own takes nearly three times as many."""
    policy = Target(rough("qwen2", num_hidden_layers=24))
    with policy.rollout():
        cache = SlotCache()
        cache.allocate(8, 64, (policy.dtype, policy.device))
        place, ids = torch.arange(4).expand(8, -1), torch.ones(8, 4, dtype=torch.int64)
        policy.forward(cache, (0, 8), ids, place, 4, keep_logits=1)
        policy.forward(cache, (0, 8), ids, place + 4, 32)
        with Counting() as lean:
            policy.forward(cache, (0, 8), ids, place + 4, 32)
        policy._lean = None
        with Counting() as own:
            policy.forward(cache, (0, 8), ids, place + 4, 32)
    assert lean.calls <= (730 if columns else 700) and own.calls > (2.9 if columns else 3) * lean.calls


def test_the_faster_way_round_is_timed_once_for_float32_on_a_cpu(monkeypatch):
    monkeypatch.setattr(products, "_found", {})
    times = iter([(1.2, 1.0)])
    monkeypatch.setattr(products, "_seconds", lambda: next(times))
    assert products.tokens_as_columns(torch.empty(1)) and products.tokens_as_columns(torch.empty(2))
    assert not products.tokens_as_columns(torch.empty(1, dtype=torch.bfloat16))
    assert not products.tokens_as_columns(torch.empty(1, device="meta"))


def test_rows_stay_where_columns_gain_little(monkeypatch):
    monkeypatch.setattr(products, "_found", {})
    monkeypatch.setattr(products, "_seconds", lambda: (1.1, 1.0))
    assert not products.tokens_as_columns(torch.empty(1))
