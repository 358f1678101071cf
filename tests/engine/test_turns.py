"""Turns read only what is new, and draw what they would draw had they read everything."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from spec_rollout.config import SpecConfig
from spec_rollout.engine import beginnings
from spec_rollout.engine.beginnings import Beginning, Beginnings
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.room import GIB
from spec_rollout.records import SamplingParams
from tests.engine.conversations import ERROR, TOLD, TURNS, Talk, check, keeping, nudged
from tests.engine.test_bfloat16 import wide_llama
from tests.engine.test_room import bounded
from tests.engine.test_virtual_tokens import tuned
from tests.tiny import PROMPTS, VOCAB, assert_same, make_policy, policy, reference

ATTENTION = ("llama", "mistral", "gemma3_text", "gpt2", "llama4_text")
HYBRIDS = ("qwen3_5_text", "lfm2", "bamba")
ROWS = len(PROMPTS)


@pytest.fixture(autouse=True)
def short_beginnings(monkeypatch):
    """These conversations begin with few tokens."""
    monkeypatch.setattr(beginnings, "LEAST", 0)


@pytest.mark.parametrize("slots", [3, 64])
@pytest.mark.parametrize("name", [*ATTENTION, *HYBRIDS])
def test_a_turn_reads_what_tools_said(name, slots):
    talk = check(name, slots)
    assert talk.read[1:] == [TOLD * ROWS] * (TURNS - 1)  # and the last token drawn, but for what the first pass takes
    kept = talk.engine.kept_rows
    assert len(kept) == ROWS and kept.bytes == sum(row.bytes for row in kept._rows)  # those of earlier turns are gone


def test_through_transformers_passes(monkeypatch):
    monkeypatch.setattr("spec_rollout.engine.lean.choice.family_of", lambda model: None)
    assert check("llama").read[1:] == [TOLD * ROWS] * (TURNS - 1)


def test_five_turns_over_2000_tokens(monkeypatch):
    """A tool loop of ten rows in eight slots: with penalties, so that all that was read counts."""
    model = make_policy("llama", max_position_embeddings=4096)
    generator = torch.Generator().manual_seed(1)
    system = torch.randint(VOCAB, (1500,), generator=generator).tolist()
    prompts = [[*system, *torch.randint(VOCAB, (400 + i,), generator=generator).tolist()] for i in range(10)]
    options = {"max_new_tokens": 30, "temperature": 0.9, "repetition_penalty": 1.05}
    config = {"max_slots": 8, "num_speculative_tokens": 0}
    talk = Talk(keeping(model, **config), prompts, **options)
    whole = Talk(RolloutEngine(model, SpecConfig(**config)), prompts, **options)
    got = talk.go(5)
    monkeypatch.setattr(Beginnings, "find", lambda self, request: Beginning())
    for with_, without in zip(got, whole.go(5), strict=True):
        assert_same(with_, without)
    new = 1500 + sum(400 + i for i in range(10)) + 4 * 10 * (30 + TOLD)
    assert sum(talk.read) <= 1.2 * new and sum(whole.read) > 10 * 5 * 1900 > 10 * sum(talk.read)
    assert talk.engine.stats.reused_tokens + sum(talk.read) == sum(whole.read)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "lfm2"])
@pytest.mark.parametrize("rows", [1.5, 4.5])
def test_kept_rows_give_way(name, rows):
    """A pool so small that rows are preempted as well."""
    engine = bounded(policy(name), rows, 96)
    engine.keep_rows()
    talk, bound = Talk(engine, max_new_tokens=20), engine.config.max_cache_gib * GIB
    free = Talk(RolloutEngine(policy(name)), max_new_tokens=20)
    for _ in range(TURNS):
        assert_same(talk.take(), free.take(), ERROR)
        assert 0 < engine.kept_rows.bytes <= bound
    assert engine.stats.cache_bytes <= bound and len(engine.kept_rows) < ROWS
    assert engine.stats.preemptions > 0
    assert talk.read[2] > TOLD * ROWS
    assert rows < 4 or engine.stats.reused_tokens > free.engine.stats.reused_tokens + 20


def test_rows_that_were_preempted_read_less_of_what_siblings_have():
    """They come back behind the prompt of a row that is still there."""
    prompts, params = [[*range(1, 41)]] * 4, SamplingParams(max_new_tokens=45)
    limits = [20, 45, 30, 45]
    engine = bounded(policy("llama"), 2.2, 96)
    expected = reference(policy("llama"), prompts, params, max_new_tokens=limits)
    assert_same(engine.generate(prompts, params, max_new_tokens=limits), expected)
    assert engine.stats.preemptions > 0
    assert engine.stats.prefilled_tokens < 39 * (1 + engine.stats.preemptions)


@pytest.mark.parametrize("tuning", ["prompt", "prefix"])
def test_virtual_tokens(tuning):
    model = tuned("llama", tuning)
    prompts = [[3, 5, 7], [2], [3, 5, 7], [9, 8, 7, 6, 5]]
    talk, whole = (Talk(engine, prompts) for engine in (keeping(model), RolloutEngine(model)))
    for turn in range(3):
        assert_same(talk.take(), whole.take())
        with torch.no_grad():  # a change of the virtual tokens alone
            if turn == 1:
                next(model.prompt_encoder.parameters()).add_(0.1)
    assert talk.read[1] == TOLD * 4 and talk.read[2] == whole.read[2]


def test_bfloat16():
    """As anywhere in this dtype: the same bits where a row's sums are the same in any company."""
    model = wide_llama()
    x, weight = torch.randn(64, 2048).to(torch.bfloat16), model.model.layers[0].mlp.gate_proj.weight
    if any(not torch.equal(F.linear(x[:n], weight), F.linear(x, weight)[:n]) for n in (2, 3, 8, 33)):
        pytest.skip("this processor's products depend on the number of rows")
    config = {"num_speculative_tokens": 0}
    prompts = [[*range(7, 67)], [9], *([n, n + 1] for n in range(11, 16))]
    talk, whole = (Talk(e, prompts) for e in (keeping(model, **config), RolloutEngine(model, SpecConfig(**config))))
    for _ in range(TURNS):
        assert_same(talk.take(), whole.take(), 0.0)
    assert talk.read[1:] == [TOLD * len(prompts)] * (TURNS - 1)


def stepped(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    optimizer.step()
    model.zero_grad()


def loaded(model):
    model.load_state_dict({name: tensor * 1.1 for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize("name", ["llama", "lfm2"])
@pytest.mark.parametrize("change", [nudged, stepped, loaded])
def test_another_version_of_the_policy_reads_everything(name, change):
    talk = Talk(keeping(make_policy(name), num_speculative_tokens=0))
    talk.take()
    change(talk.engine.target.model)
    prompts = [list(prompt) for prompt in talk.prompts]
    assert_same(talk.take(), reference(talk.engine.target.model, prompts, talk.params, (1,)), ERROR)
    assert talk.read[1] > TOLD * ROWS
    talk.take()
    assert talk.read[2] == TOLD * ROWS


def test_another_adapter_reads_everything():
    model = get_peft_model(make_policy("llama"), LoraConfig(r=4, init_lora_weights=False))
    model.add_adapter("other", LoraConfig(r=4, init_lora_weights=False))
    talk, whole = (Talk(engine) for engine in (keeping(model), RolloutEngine(model)))
    for change in (None, lambda: model.set_adapter("other"), model.base_model.disable_adapter_layers, None):
        if change:
            change()
        assert_same(talk.take(), whole.take())
    assert talk.read[1:3] == whole.read[1:3] and talk.read[3] == TOLD * ROWS


def test_another_dtype_reads_everything():
    talk = Talk(keeping(make_policy("llama"), num_speculative_tokens=0))
    talk.take()
    talk.engine.target.model.double()
    prompts = [list(prompt) for prompt in talk.prompts]
    assert_same(talk.take(), reference(talk.engine.target.model, prompts, talk.params, (1,)))
    assert talk.read[1] > TOLD * ROWS and {k.dtype for row in talk.engine.kept_rows._rows for k in row.slot.keys} == {
        torch.float64
    }


def test_nothing_is_kept_unless_asked_or_of_a_call_that_failed():
    engine = RolloutEngine(policy("llama"), SpecConfig(num_speculative_tokens=0))
    Talk(engine).go(2)
    assert engine.kept_rows is None
    engine.keep_rows()
    talk = Talk(engine)
    talk.go(2)
    assert len(engine.kept_rows) == ROWS and engine.cache.keys == []
    engine.progress = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        talk.take()
    assert len(engine.kept_rows) == 0 == engine.kept_rows.bytes
    engine.progress = None
    talk.go(2)
    engine.forget()
    assert len(engine.kept_rows) == 0 == engine.kept_rows.bytes
