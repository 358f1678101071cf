"""The engine and `transformers.generate` mean the same by every option."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import tests.tiny
from spec_rollout import UnsupportedModelError
from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.sampling import Sampler
from spec_rollout.engine.stops import Stops
from spec_rollout.engine.transfers import on_both_sides
from spec_rollout.records import Completion, Request, SamplingParams
from tests.tiny import PROMPTS, VOCAB, Scripted, make_policy, policy, processed, reference, tokenizer
from tests.tiny_configs import MAIN

GAMMAS = (2, 0, 7, 1, 5)


def generate(model, prompt: list[int], **options) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **options)
    return output[0, len(prompt) :].tolist()


def both(model, params: SamplingParams, **options) -> tuple[list[list[int]], list[list[int]], float]:
    """Token ids of `generate`, of the engine with a drafter that knows them, and its mean acceptance length."""
    if params.stop_strings:
        options["tokenizer"] = tokenizer()
    theirs = {tuple(p): generate(model, p, max_new_tokens=params.max_new_tokens, **options) for p in PROMPTS}
    expected = [theirs[tuple(p)] for p in PROMPTS]
    drafter = OracleDrafter([Completion(ids, [], "length") for ids in expected])
    engine = RolloutEngine(
        model, SpecConfig(max_slots=4), drafter=drafter, controller=Scripted(*GAMMAS), tokenizer=tokenizer()
    )
    got = [c.token_ids for c in engine.generate(PROMPTS, params)]
    return expected, got, engine.stats.mean_acceptance_length


@pytest.mark.parametrize("name", MAIN)
def test_greedy(name):
    expected, got, length = both(policy(name), SamplingParams(max_new_tokens=20, temperature=0))
    assert got == expected and length > 2


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_greedy_with_repetition_penalty(penalty):
    params = SamplingParams(max_new_tokens=20, temperature=0, repetition_penalty=penalty)
    expected, got, length = both(policy("qwen2"), params, repetition_penalty=penalty)
    assert got == expected and length > 2


def test_greedy_with_several_eos():
    free = generate(policy("qwen2"), PROMPTS[3], max_new_tokens=20)
    eos = (free[11], free[5])
    params = SamplingParams(max_new_tokens=20, temperature=0, eos_token_ids=eos)
    expected, got, length = both(policy("qwen2"), params, eos_token_id=list(eos))
    assert len(expected[3]) <= 6 and got == expected and length > 1.5


def test_greedy_with_stop_strings():
    """Also where a stop string begins in the prompt, or ends in the middle of a token."""
    model = make_policy("llama", std=0.25)
    text = tokenizer().decode
    free = [generate(model, p, max_new_tokens=20) for p in PROMPTS]
    stop = (text(PROMPTS[3][-1:])[-1] + text(free[3][:1])[:2], text(free[0][4:6])[-3:])
    params = SamplingParams(max_new_tokens=20, temperature=0, stop_strings=stop)
    expected, got, length = both(model, params, stop_strings=list(stop))
    assert len(expected[3]) == 1 and got == expected and length > 1


def test_greedy_with_equal_scores():
    """Of equal logits the lower token id wins."""
    model = make_policy("llama")
    with torch.no_grad():
        model.lm_head.weight[VOCAB // 2 :] = model.lm_head.weight[: VOCAB - VOCAB // 2].clone()
    expected, got, length = both(model, SamplingParams(max_new_tokens=20, temperature=0))
    assert got == expected and length > 2


ANOTHER = "takes_neither_here"
AttentionInterface.register(ANOTHER, sdpa_attention_forward)
AttentionMaskInterface.register(ANOTHER, sdpa_mask)


def test_an_attention_that_this_machine_lacks():
    """What the policy itself cannot be read by, nothing can be proven against."""
    model = make_policy("llama")
    model.config._attn_implementation = "flash_attention_2"
    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=0))
    with pytest.raises(UnsupportedModelError, match="cannot read a sequence.*'flash_attention_2'.*such as 'sdpa'"):
        engine.generate(PROMPTS, SamplingParams(max_new_tokens=2))
    assert model.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_attention_implementations(name):
    """Masks as booleans (sdpa) and as additive floats (eager); another one is set aside and put back."""
    params = SamplingParams(max_new_tokens=15)
    expected = reference(policy(name), PROMPTS, params)
    model = make_policy(name)
    for implementation in ("eager", "sdpa", ANOTHER):
        model.config._attn_implementation = implementation
        engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=3), drafter=OracleDrafter(expected))
        got = engine.generate(PROMPTS, params)
        assert model.config._attn_implementation == implementation
        assert [c.token_ids for c in got] == [c.token_ids for c in expected]
        assert engine.stats.mean_acceptance_length > 3


LAWS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0, repetition_penalty=1.5),
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(top_k=5),
    SamplingParams(top_k=10 * VOCAB),
    SamplingParams(top_p=0.7),
    SamplingParams(min_p=0.1),
    SamplingParams(repetition_penalty=2.0),
    SamplingParams(temperature=1.7, top_k=40, top_p=0.8),
    SamplingParams(temperature=0.5, top_p=0.9, min_p=0.05, repetition_penalty=0.6),
    SamplingParams(temperature=2.5, top_k=7, top_p=0.95, min_p=0.2, repetition_penalty=1.3),
]


@pytest.mark.parametrize("params", LAWS, ids=range(len(LAWS)))
def test_processors_see_the_guessed_prefix(params):
    """At verify position i the logits are processed as `generate` would after the prompt, the tokens so far and the
    first i guesses, to the last bit."""
    generator = torch.Generator().manual_seed(0)
    rows = Rows(5, 64, VOCAB, tests.tiny.DEVICE)
    requests = [Request(i, p, (i, -i), 20) for i, p in enumerate(PROMPTS[:4])]
    rows.fill(0, requests)
    rows.count = 4
    sampler = Sampler(params, rows)
    sampler.admit(rows, 0, len(requests))
    known = [list(r.prompt) for r in requests]
    for _ in range(3):  # three steps, each emitting a part of what it drew
        guesses = torch.randint(VOCAB, (4, 3), generator=generator)
        inputs = torch.cat([rows.newest(), guesses], 1)
        logits = torch.randn(4, 4, VOCAB, generator=generator) * 4
        z = sampler.process(logits, sampler.seen_along(rows, inputs))
        for row, place in [(r, p) for r in range(4) for p in range(4)]:
            prefix = known[row] + guesses[row, :place].tolist()
            assert torch.equal(z[row, place], processed(policy("llama"), params, prefix, logits[row, place]))
        samples = torch.randint(VOCAB, (4, 4), generator=generator)
        emitted = torch.randint(1, 5, (4,), generator=generator)
        rows.tokens[:4].scatter_(1, rows.positions(4) + 1, samples)
        sampler.commit(rows, samples, emitted)
        rows.length[:4] += emitted
        known = [k + s[:n] for k, s, n in zip(known, samples.tolist(), emitted.tolist(), strict=True)]


def test_a_moved_row_takes_what_it_has_seen_along():
    params = SamplingParams(repetition_penalty=1.5)
    rows = Rows(3, 64, VOCAB, tests.tiny.DEVICE)
    sampler = Sampler(params, rows)
    rows.fill(0, [Request(i, p, (0, 0), 9) for i, p in enumerate(([1, 2], [3], [4, 5, 6]))])
    sampler.admit(rows, 0, 3)
    sampler.copy(*(on_both_sides([slot], rows.device) for slot in (2, 0)))
    assert sampler.seen[0].nonzero().flatten().tolist() == [4, 5, 6]
    rows.fill(0, [Request(3, [7], (0, 0), 9)])
    sampler.admit(rows, 0, 1)  # a new row starts afresh
    assert sampler.seen[0].nonzero().flatten().tolist() == [7]


def test_stops_are_found_at_every_position_at_once():
    """Flags of T samples are the flags of the same tokens given one at a time."""
    params = SamplingParams(stop_strings=("abca", "dd", "c b"), eos_token_ids=(17,))
    rows = Rows(4, 64, VOCAB, tests.tiny.DEVICE)
    rows.fill(0, [Request(i, p, (0, 0), 20) for i, p in enumerate(PROMPTS[:4])])
    rows.count = 4
    stops = Stops(params, tokenizer(), rows.device)
    samples = torch.randint(85, (4, 12), generator=torch.Generator().manual_seed(1))
    rows.tokens[:4].scatter_(1, rows.positions(12) + 1, samples)
    together = stops.flags(rows, samples)
    single = []
    for place in range(12):
        single.append(stops.flags(rows, samples[:, place : place + 1]))
        rows.length[:4] += 1
    assert torch.equal(together, torch.cat(single, 1))
    text = tokenizer().decode
    for row, prompt in enumerate(PROMPTS[:4]):
        for place, token in enumerate(samples[row].tolist()):
            whole, last = text([*prompt, *samples[row, : place + 1].tolist()]), text([token])
            found = any(s in whole[-len(last) - len(s) + 1 :] for s in params.stop_strings)
            assert together[row, place] == (found or token == 17)
    assert together.any() and not together.all()


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("llama", SamplingParams(max_new_tokens=20)),
        ("gemma3_text", SamplingParams(max_new_tokens=20, temperature=0.7, top_p=0.9, top_k=30)),
        ("gpt_oss", SamplingParams(max_new_tokens=20, temperature=0, repetition_penalty=1.2)),
    ],
)
def test_logprobs_are_teacher_forced(name, params):
    """One forward pass over prompt and completion, processed, gives the log-probs that were returned."""
    model = policy(name)
    plain = RolloutEngine(model, SpecConfig(num_speculative_tokens=0)).generate(PROMPTS, params)
    engine = RolloutEngine(model, SpecConfig(max_slots=3), drafter=OracleDrafter(plain), controller=Scripted(*GAMMAS))
    for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        ids = [*prompt, *completion.token_ids]
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        for place, logprob in enumerate(completion.logprobs):
            end = len(prompt) + place
            z = processed(model, params, ids[:end], logits[end - 1])
            assert abs(float(z.log_softmax(-1)[ids[end]]) - logprob) < 1e-4
    assert engine.stats.mean_acceptance_length > 2
