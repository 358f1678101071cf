"""In bfloat16 a token may flip at a near-tie; nothing else may differ. On a CPU whose sums do not depend on how many
rows are multiplied, none flips.

Every first divergence between plain and speculative decoding is scored again, and the two candidates must lie within
the band in which two plain decodes of other shapes differ.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter, RandomDrafter
from spec_rollout.engine import target
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.noise import request_keys
from spec_rollout.engine.target import Target
from spec_rollout.records import SamplingParams
from tests.engine.recorded import common, difference, recorded
from tests.tiny import PROMPTS, Scripted, assert_same, gumbel_max, make_policy, reference

PARAMS = SamplingParams(max_new_tokens=24)
PLAIN = SpecConfig(num_speculative_tokens=0)


def scores(model, index: int, known: list[int], position: int) -> tuple[list, list[list]]:
    """Scores of the blocks and of their tokens at one position, from a pass over the whole sequence."""
    with torch.no_grad():
        z = model(torch.tensor([known]), use_cache=False).logits[0, -1].float()
    return gumbel_max(z, request_keys((0,), len(PROMPTS))[index], position)[1:]


def margin(blocks: list, tokens: list[list]) -> float:
    """The least lead of the winner."""
    inside = tokens[blocks.index(max(blocks))]
    return min(best - second for best, second in (sorted(s, reverse=True)[:2] for s in (blocks, inside)))


def apart(blocks: list, tokens: list[list], one: int, other: int) -> float:
    """Difference of the scores that decide between two tokens."""
    (a, i), (b, j) = (divmod(token, len(tokens[0])) for token in (one, other))
    return abs(tokens[a][i] - tokens[a][j] if a == b else blocks[a] - blocks[b])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_divergences_are_near_ties(name, autocast):
    model = make_policy(name, torch.float32 if autocast else torch.bfloat16)
    if autocast:  # as accelerate wraps a policy under `bf16=True`
        model.forward = torch.autocast(model.device.type, dtype=torch.bfloat16)(model.forward)
    batched, a = recorded(RolloutEngine(model, PLAIN), PROMPTS, PARAMS)
    single, b = recorded(RolloutEngine(model, SpecConfig(num_speculative_tokens=0, max_slots=1)), PROMPTS, PARAMS)
    places = common(batched, single)
    whole = {}
    for index, position in places[::5]:
        known = [*PROMPTS[index], *batched[index].token_ids[:position]]
        with torch.no_grad():
            whole[index, position] = model(torch.tensor([known]), use_cache=False).logits[0, -1].float()
    band = max(difference(a, b, places), difference(a, whole, list(whole)))
    assert band < 0.25  # of logits whose standard deviation is about 2: rounding, not a mistake

    # two candidates, each off by the band in either of two passes; the band is a maximum over a sample: twice that
    bound = 4 * band
    margins = []
    for drafter, gammas, slots in (
        (OracleDrafter(batched), (7, 3, 0, 1), 64),
        (OracleDrafter(batched), (5,), 2),
        (RandomDrafter(), (2, 6), 64),
    ):
        engine = RolloutEngine(model, SpecConfig(max_slots=slots), drafter=drafter, controller=Scripted(*gammas))
        got, c = recorded(engine, PROMPTS, PARAMS)
        assert difference(a, c, common(batched, got)) <= max(2 * band, 1e-6)
        assert engine.stats.drafted > 0
        assert isinstance(drafter, RandomDrafter) or engine.stats.mean_acceptance_length > 1.5
        for index, position in common(batched, got):
            mine, theirs = batched[index].token_ids[position], got[index].token_ids[position]
            if mine != theirs or position % 10 == 0:
                score = scores(model, index, [*PROMPTS[index], *got[index].token_ids[:position]], position)
                margins.append(margin(*score))
                assert apart(*score, mine, theirs) <= bound
    assert sum(m > bound for m in margins) > 0.5 * len(margins)  # the bound tells near-ties from the rest


def test_autocast_is_known_for_what_it_is():
    """Weights of float32, arithmetic of bfloat16: the probe allows for its rounding, and near-ties are left alone."""
    model = make_policy("llama")
    model.forward = torch.autocast(model.device.type, dtype=torch.bfloat16)(model.forward)
    engine = RolloutEngine(model, PLAIN)
    engine.generate(PROMPTS, SamplingParams(max_new_tokens=20, temperature=0))
    assert engine.target.dtype == torch.float32 and engine.target.precision == torch.bfloat16
    assert engine.stats.near_ties == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype):
    found = Target(make_policy("llama", dtype))
    with found.rollout():
        assert found.precision == dtype


def test_precision_is_that_of_each_rollout():
    """Autocast once and then not, bfloat16 weights and then float32: near-ties are settled wherever they can be, and
    keys and values are kept in what the policy computes in."""
    model = make_policy("llama")
    expected = reference(model, PROMPTS, PARAMS)
    engine, kept = RolloutEngine(model, PLAIN), []
    engine.progress = lambda *_: kept.append(engine.cache.values[0].dtype)
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        engine.generate(PROMPTS, PARAMS)
    assert engine.target.precision == kept[-1] == torch.bfloat16
    assert_same(engine.generate(PROMPTS, PARAMS), expected)
    assert engine.target.precision == kept[-1] == torch.float32
    model.bfloat16()
    engine.generate(PROMPTS, PARAMS)
    assert engine.target.precision == kept[-1] == torch.bfloat16
    model.float()
    assert_same(engine.generate(PROMPTS, PARAMS), reference(model, PROMPTS, PARAMS))
    assert engine.target.precision == kept[-1] == torch.float32


def test_logits_of_zero_say_nothing_about_precision():
    model = make_policy("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    engine = RolloutEngine(model, PLAIN)
    got = engine.generate(PROMPTS, SamplingParams(max_new_tokens=4, temperature=0))
    assert engine.target.precision == torch.float32 and engine.stats.near_ties == 4 * len(PROMPTS)
    assert [c.token_ids for c in got] == [[0] * 4] * len(PROMPTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_output_head_in_float32(dtype):
    """As `cast_lm_head_to_fp32` of TRL makes it: the rest decides."""
    model = make_policy("llama", dtype)
    model.lm_head.float()
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=3), drafter=RandomDrafter())
    engine.generate(PROMPTS, PARAMS)
    assert engine.target.precision == dtype and engine.stats.near_ties == 0


def test_rounded_products_count_as_bfloat16(monkeypatch):
    """Weights and values of float32 whose products are TF32, or bfloat16 on some CPUs."""
    assert not target.rounds_products(torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert target.rounds_products(torch.device("cpu"))
    monkeypatch.setattr(target, "rounds_products", lambda device: True)
    engine = RolloutEngine(make_policy("llama"), PLAIN)
    engine.generate(PROMPTS, SamplingParams(max_new_tokens=4))
    assert engine.target.precision == torch.bfloat16


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # a product of one row is shared out between them in another way
    yield
    torch.set_num_threads(threads)


def wide_llama() -> LlamaForCausalLM:
    """So wide that a product of one row is summed otherwise; its heads so narrow that short sums are, too."""
    sizes = {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 500}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=256)).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.06)
    return model.to(torch.bfloat16)


def test_tokens_are_identical_where_sums_do_not_depend_on_the_number_of_rows(two_threads):
    model = wide_llama()
    x = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight = model.model.layers[0].mlp.gate_proj.weight
    whole = F.linear(x, weight)
    if any(not torch.equal(F.linear(x[:n], weight), whole[:n]) for n in (2, 3, 8, 33)):
        pytest.skip("this processor's products depend on the number of rows")
    prompts = [[*range(7, 67)], [9], *([n, n + 1] for n in range(11, 15))]
    params = SamplingParams(max_new_tokens=5)
    plain = RolloutEngine(model, PLAIN).generate(prompts, params)
    for drafter, gammas, slots in (
        (None, (0,), 1),
        (OracleDrafter(plain), (3,), 64),
        (OracleDrafter(plain), (7, 0, 2, 0), 1),
        (RandomDrafter(), (3, 0), 2),
    ):
        engine = RolloutEngine(model, SpecConfig(max_slots=slots), drafter=drafter, controller=Scripted(*gammas))
        assert_same(engine.generate(prompts, params), plain, logprob_error=0.0)
        assert not isinstance(drafter, OracleDrafter) or engine.stats.mean_acceptance_length > 1.5
