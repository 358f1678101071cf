"""Nothing silent and nothing lost: bad input is refused before anything runs, a broken drafter is switched off."""

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from spec_rollout import UnsupportedModelError
from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter, RandomDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import SamplingParams
from tests.tiny import PROMPTS, SIZES, VOCAB, Scripted, assert_same, cut, make_policy, policy, reference

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
    with pytest.raises(ValueError, match="stop_strings=.'a',. need a tokenizer.*pass `tokenizer`"):
        engine.generate(PROMPTS, SamplingParams(max_new_tokens=9, stop_strings=("a",)))


def test_stop_strings_as_one_string():
    with pytest.raises(ValueError, match="stop_strings='abc' is one string.*tuple"):
        SamplingParams(max_new_tokens=9, stop_strings="abc")


def test_an_output_head_of_another_width():
    """More logits than the vocabulary has ids, or fewer."""
    for width in (VOCAB + 31, VOCAB - 1):
        model = make_policy("llama")
        model.lm_head = torch.nn.Linear(32, width, bias=False)
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


class Broken(OracleDrafter):
    """Right until `verb` has been called `good` times, then broken in the way that `breakage` says."""

    def __init__(self, completions, verb, breakage, good):
        super().__init__(completions)
        self.calls = 0
        honest = getattr(self, verb)

        def breaks(rows, *args):
            self.calls += 1
            return honest(rows, *args) if self.calls <= good else breakage(rows, *args)

        setattr(self, verb, breaks)


def raises(error):
    def breakage(*_):
        raise error

    return breakage


BREAKAGES = {
    "raises": raises(RuntimeError("broke")),
    "out of memory": raises(torch.OutOfMemoryError("CUDA out of memory")),
    "odd exception": raises(KeyError("d2t")),
    "assertion": raises(AssertionError("shape")),
    "too wide": lambda rows, gamma, *_: torch.zeros(rows.count, gamma + 1, dtype=torch.int64),
    "a row too many": lambda rows, gamma, *_: torch.zeros(rows.count + 1, gamma, dtype=torch.int64),
    "a row too few": lambda rows, gamma, *_: torch.zeros(rows.count - 1, gamma, dtype=torch.int64),
    "flat": lambda rows, gamma, *_: torch.zeros(rows.count, dtype=torch.int64),
    "deep": lambda rows, gamma, *_: torch.zeros(rows.count, gamma, 1, dtype=torch.int64),
    "NaN": lambda rows, gamma, *_: torch.full((rows.count, gamma), torch.nan),
    "float": lambda rows, gamma, *_: torch.zeros(rows.count, gamma),
    "None": lambda *_: None,
    "beyond the vocabulary": lambda rows, gamma, *_: torch.full((rows.count, gamma), VOCAB),
    "negative": lambda rows, gamma, *_: torch.full((rows.count, gamma), -1),
    "one bad id": lambda rows, gamma, *_: torch.arange(rows.count * gamma).view(rows.count, gamma).sub_(1),
}


def check_switched_off(verb, breakage, good=2, **config) -> None:
    expected = cut(reference(policy("llama"), PROMPTS, PARAMS), (11, 12, 13))
    params = SamplingParams(max_new_tokens=16, eos_token_ids=(11, 12, 13))
    controller = Scripted(3)
    drafter = Broken(expected, verb, breakage, good)
    engine = RolloutEngine(policy("llama"), SpecConfig(**config), drafter=drafter, controller=controller)
    with pytest.warns(RuntimeWarning, match="drafter broke and is off.*plain decoding") as caught:
        got = engine.generate(PROMPTS, params)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    assert_same(got, expected)
    assert controller.steps[-1].gamma == 0 and engine.stats.drafter_failures == 1  # the metrics show it
    assert sum(c.num_drafted for c in got) == engine.stats.drafted
    assert engine.drafter is drafter  # the next rollout may try again


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_proposal(breakage):
    check_switched_off("propose", BREAKAGES[breakage])


@pytest.mark.parametrize(
    ("verb", "good"),
    [("begin", 0), ("admit", 0), ("admit", 1), ("observe", 0), ("observe", 4), ("copy", 0), ("finish", 1)],
)
def test_broken_verb(verb, good):
    check_switched_off(verb, BREAKAGES["raises"], good, max_slots=3)


class Meddler(OracleDrafter):
    """Writes wherever it can reach, and keeps what it was shown to write into it later."""

    def __init__(self, completions, gamma):
        super().__init__(completions)
        self.gamma, self.kept = gamma, []

    def meddle(self, *tensors) -> None:
        for rows in {id(r): r for r in self.kept}.values():
            for name in ("tokens", "length", "start", "limit", "request", "key", "logprobs", "steps", "counts"):
                getattr(rows, name).fill_(3)
            rows.lengths[:], rows.starts[:], rows.count = 1, 1, 1
        for tensor in tensors:
            tensor.numpy()[...] = 5

    def begin(self, rows):
        super().begin(rows)
        self.kept.append(rows)

    def propose(self, rows, gamma, noise, temperature):
        guesses = super().propose(rows, gamma, noise, temperature)
        self.kept.append(rows)
        self.meddle(*([] if noise is None else [noise]))
        self.last = guesses
        return guesses

    def observe(self, rows, slots, start, hidden):
        self.kept.append(rows)
        self.meddle(start, *hidden)
        if hasattr(self, "last"):
            self.last.fill_(4)

    def admit(self, rows, slots):
        self.meddle()

    def copy(self, rows, source, target):
        self.meddle(source, target)

    def finish(self, rows, slots):
        self.meddle(slots)


@pytest.mark.parametrize("params", [PARAMS, SamplingParams(max_new_tokens=16, temperature=0)])
@pytest.mark.parametrize("slots", [3, 64])
def test_a_drafter_that_writes_to_what_it_is_shown(slots, params):
    expected = reference(policy("llama"), PROMPTS, params)
    drafter = Meddler(expected, 3)
    engine = RolloutEngine(policy("llama"), SpecConfig(num_speculative_tokens=3, max_slots=slots), drafter=drafter)
    assert_same(engine.generate(PROMPTS, params), expected)
    assert engine.stats.mean_acceptance_length > 2 and engine.stats.drafter_failures == 0  # it guesses right meanwhile


def test_a_shorter_proposal_is_welcome():
    """A drafter may stop early; what it does not guess costs nothing."""
    expected = reference(policy("llama"), PROMPTS, PARAMS)
    drafter = OracleDrafter(expected)
    honest = drafter.propose
    drafter.propose = lambda rows, gamma, *rest: honest(rows, gamma, *rest)[:, : gamma // 2]
    controller = Scripted(4, 1)
    engine = RolloutEngine(policy("llama"), drafter=drafter, controller=controller)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = engine.generate(PROMPTS, PARAMS)
    assert_same(got, expected)
    assert [s.gamma for s in controller.steps[:4]] == [2, 0, 2, 0]
    assert engine.stats.mean_acceptance_length > 2.5


def test_interrupts_are_not_taken_for_a_broken_drafter():
    drafter = RandomDrafter()
    drafter.propose = raises(KeyboardInterrupt())
    engine = RolloutEngine(policy("llama"), SpecConfig(num_speculative_tokens=2), drafter=drafter)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, PARAMS)


@pytest.mark.parametrize("loss", ["raises", "ValueError"])
def test_a_failing_policy_is_not_hidden(loss):
    """Only the drafter may break in silence: an error of the policy itself reaches the caller."""
    model = make_policy("llama")
    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=2), drafter=RandomDrafter())
    engine.generate([[1]], SamplingParams(max_new_tokens=1))
    model.lm_head.register_forward_hook(raises(RuntimeError("policy") if loss == "raises" else ValueError("policy")))
    with pytest.raises((RuntimeError, ValueError), match="policy"):
        engine.generate(PROMPTS, PARAMS)
