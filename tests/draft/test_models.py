"""Drafts that do not learn: a language model with the policy's vocabulary, and the policy itself in 8 bit."""

import copy
import json

import pytest
import torch

from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.config import SpecConfig
from spec_rollout.draft import quantized
from spec_rollout.draft.draft_model import is_language_model, load_draft_model
from spec_rollout.draft.model_drafter import ModelDrafter
from spec_rollout.draft.quantized import QuantizedLinear, quantized_copy, renew
from spec_rollout.draft.references import OracleDrafter
from spec_rollout.draft.self_drafter import SelfDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.target import Target
from spec_rollout.records import SamplingParams, UnsupportedModelError
from tests.tiny import PROMPTS, VOCAB, Scripted, assert_same, make_policy, policy, tokenizer

PARAMS = SamplingParams(max_new_tokens=24, eos_token_ids=(4,))
SCHEDULE = (3, 0, 0, 2, 0, 7, 1)
EXACT = ("llama", "gpt2", "gemma2", "qwen3_moe")


def engine_for(name, make, dtype=torch.float32, **config):
    engine = RolloutEngine(make_policy(name, dtype), SpecConfig(max_slots=5, **config), controller=Scripted(*SCHEDULE))
    engine.drafter = make(engine)
    return engine


def itself(engine):
    return ModelDrafter(Target(copy.deepcopy(engine.target.model)))


def in_8_bit(engine):
    return SelfDrafter(engine.target)


def plain(name, params=PARAMS, dtype=torch.float32, **config):
    return RolloutEngine(make_policy(name, dtype), SpecConfig(**config)).generate(PROMPTS * 2, params)


@pytest.mark.filterwarnings("error:The drafter broke")
@pytest.mark.parametrize("name", EXACT)
def test_the_policy_as_its_own_draft_model_guesses_every_token(name):
    """As an oracle does: no entry of its cache is stale, whoever leaves, moves, enters or decodes without guesses."""
    expected = plain(name)
    engine = engine_for(name, itself)
    oracle = engine_for(name, lambda engine: OracleDrafter(expected))
    for one in (engine, oracle):
        assert_same(one.generate(PROMPTS * 2, PARAMS), expected)
    assert [s.accepted for s in engine.stats.steps] == [s.accepted for s in oracle.stats.steps]
    assert engine.stats.mean_acceptance_length > 2


@pytest.mark.filterwarnings("error:The drafter broke")
@pytest.mark.parametrize("params", [PARAMS, SamplingParams(24, 0.0), SamplingParams(24, 0.7, top_k=5)], ids=str)
@pytest.mark.parametrize("make", [itself, in_8_bit])
def test_no_token_is_another_one(make, params):
    engine = engine_for("qwen3", make)
    assert_same(engine.generate(PROMPTS * 2, params), plain("qwen3", params))
    assert engine.stats.mean_acceptance_length > 1.5 and engine.target.path == "lean"


@pytest.mark.filterwarnings("error:The drafter broke")
@pytest.mark.parametrize("make", [itself, in_8_bit])
def test_rejection_sampling_has_their_distributions(make):
    engine = engine_for("llama", make, verification="rejection")
    engine.generate(PROMPTS * 2, PARAMS)
    assert engine.stats.mean_acceptance_length > 1.5 and not engine.stats.drafter_failures


def test_through_transformers_too(monkeypatch):
    monkeypatch.setattr("spec_rollout.draft.self_drafter.family_of", lambda model: None)
    engine = engine_for("llama", in_8_bit)
    assert_same(engine.generate(PROMPTS * 2, PARAMS), plain("llama"))
    assert engine.stats.mean_acceptance_length > 1.5


def test_a_copy_reads_new_weights_and_shares_the_others():
    model = make_policy("llama")
    other = quantized_copy(model)
    assert other.get_input_embeddings().weight is model.get_input_embeddings().weight
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    ids = torch.tensor([[1, 2, 3, 9]])
    renew(other)
    before = other(ids).logits
    assert (before - model(ids).logits).std() < 0.1 * model(ids).logits.std()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(-1.3)
    stale, fresh = other(ids).logits, (renew(other), other(ids).logits)[1]
    wanted = model(ids).logits
    assert (fresh - wanted).std() < 0.1 * wanted.std() < (stale - wanted).std()


def test_an_adapter_guesses_too():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make_policy("llama"), config).eval()
    expected = RolloutEngine(model).generate(PROMPTS, PARAMS)
    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=3))
    engine.drafter = SelfDrafter(engine.target)
    assert_same(engine.generate(PROMPTS, PARAMS), expected)
    assert engine.stats.acceptance_rate > 0.6
    with model.disable_adapter():
        engine.drafter.stale, engine.stats.steps = True, []
        assert_same(engine.generate(PROMPTS, PARAMS), RolloutEngine(model).generate(PROMPTS, PARAMS))


@pytest.mark.parametrize("part", ["v_proj", "lm_head"])
def test_what_is_not_finite_ends_the_guesses_and_stays_nowhere(part):
    """The second guess's pass leaves NaN, where no later pass of plain decoding writes before it reads."""
    engine = engine_for("llama", in_8_bit)
    engine.drafter.renew()
    model = engine.drafter._target.model
    layer = model.lm_head if part == "lm_head" else model.model.layers[0].self_attn.v_proj
    honest, calls = layer.forward, []

    def breaks(x):
        calls.append(1)
        return honest(x) if len(calls) < 2 else torch.full((*x.shape[:-1], layer.out_features), torch.nan)

    layer.forward = breaks
    with pytest.warns(RuntimeWarning, match="The drafter broke"):
        assert_same(engine.generate(PROMPTS * 2, PARAMS), plain("llama"))
    assert engine.stats.drafter_failures == 1


def test_a_short_context_ends_the_guesses_not_the_rollout(tmp_path):
    engine = RolloutEngine(policy("llama"), SpecConfig(max_slots=5, num_speculative_tokens=3))
    small = make_policy("llama", max_position_embeddings=16)
    small.load_state_dict(engine.target.model.state_dict())
    engine.drafter = ModelDrafter(Target(small))
    assert_same(engine.generate(PROMPTS * 2, PARAMS), plain("llama"))
    steps = engine.stats.steps
    assert any(step.gamma == 3 for step in steps) and all(
        step.context - step.gamma < 16 for step in steps if step.gamma
    )
    assert any(step.gamma == 0 for step in steps) and not engine.stats.drafter_failures


# Refused


def saved(tmp_path, name="llama", vocabulary=None, **options):
    folder = tmp_path / "model"
    make_policy(name, **options).save_pretrained(folder)
    if vocabulary is not None:
        vocabulary.save_pretrained(folder)
    return folder


def test_another_vocabulary_is_refused(tmp_path):
    folder = saved(tmp_path, vocab_size=VOCAB + 8)
    with pytest.raises(
        ValueError, match=f"a vocabulary of {VOCAB + 8} tokens, this policy has {VOCAB}: .*same family"
    ):
        EmbeddedBackend(policy("llama"), SpecConfig(draft_model_path=str(folder)))


def test_another_tokenizer_is_refused(tmp_path):
    folder = saved(tmp_path, vocabulary=tokenizer())
    load_draft_model(folder, Target(policy("llama")), tokenizer())
    file = folder / "tokenizer.json"
    state = json.loads(file.read_text())
    known = state["model"]["vocab"]
    known["a"], known["b"] = known["b"], known["a"]
    file.write_text(json.dumps(state))
    with pytest.raises(
        ValueError, match="another tokenizer than this policy: token 1 is 'b' there and 'a' here, and 4"
    ):
        load_draft_model(folder, Target(policy("llama")), tokenizer())


def test_a_recurrent_draft_model_is_refused(tmp_path):
    folder = saved(tmp_path, "qwen3_5_text")
    with pytest.raises(ValueError, match="recurrent layers cannot go back"):
        load_draft_model(folder, Target(policy("llama")), None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3_5_text", "has recurrent layers"),
        ("gpt2", "would leave 8.% of the policy as it is, and half is the most"),
    ],
)
def test_what_cannot_be_put_in_8_bit_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        EmbeddedBackend(policy(name), SpecConfig(draft_quantized=True))


def test_a_torch_without_products_of_8_bits_is_refused(monkeypatch):
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["none"])
    with pytest.raises(ValueError, match="multiplies in 8 bit on x86; this one, .* has none: leave it at False"):
        quantized.refuse_unquantizable(policy("llama"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rollout_backend": "vllm"}, "rollout_backend='vllm'"), ({"draft_model_path": "x"}, "draft_model_path")],
)
def test_options_that_exclude_each_other(options, message):
    with pytest.raises(ValueError, match=f"draft_quantized=True does not go with {message}"):
        SpecConfig(draft_quantized=True, **options)


def test_a_head_is_no_language_model(tmp_path):
    assert is_language_model(saved(tmp_path))
    backend = EmbeddedBackend(policy("llama"), SpecConfig(num_speculative_tokens=3))
    backend.save(tmp_path / "head")
    assert not is_language_model(tmp_path / "head") and not is_language_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds a whole language model and no head"):
        backend.learner.load(tmp_path / "model")


def test_what_cannot_be_decoded_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError):
        load_draft_model(saved(tmp_path, "bloom"), Target(policy("llama")), None)
