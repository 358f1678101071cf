"""Training unrolls the head exactly as decoding runs it."""

from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tests.tiny
from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.features import FeatureBuffer, Sample
from spec_rollout.draft.packing import pack
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.unroll import unroll
from spec_rollout.engine.noise import gumbel
from spec_rollout.engine.rows import Rows

VOCAB, HIDDEN, LENGTHS = 61, 32, (9, 14, 5)


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=5)
    return LlamaForCausalLM(
        LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    )


@pytest.fixture(scope="module")
def samples():
    torch.manual_seed(1)
    return [Sample(torch.randint(VOCAB, (n + 1,)), torch.randn(n, 4 * HIDDEN), 3, 0) for n in LENGTHS]


def committed_rows(samples, guesses=8):
    rows = Rows(len(samples), max(LENGTHS) + guesses, VOCAB, tests.tiny.DEVICE)
    rows.count = len(samples)
    for slot, sample in enumerate(samples):
        n = len(sample.features)
        rows.tokens[slot, : n + 1] = sample.tokens
        rows.length[slot] = rows.lengths[slot] = n
    return rows


def drafter_with(policy, samples, rows, head, compiled=False):
    drafter = EagleDrafter(head, PolicyView(policy), compiled=compiled)
    drafter.ready = True
    drafter.begin(rows)
    drafter.resize(rows, 0)
    for slot, sample in enumerate(samples):
        drafter.window.kept[slot, : len(sample.features)] = sample.features[:, : drafter.fused_width]
    return drafter


@torch.no_grad()
@pytest.mark.parametrize("some", [False, True])
def test_unrolled_states_are_the_states_of_decoding(policy, samples, some):
    """Step j from entry p equals the j-th guess of a row with p + 1 committed tokens and the same tokens after."""
    view = PolicyView(policy)
    head = EagleHead(HeadConfig.for_target(policy.config))
    packed = pack(samples, width=32)
    steps, cut = 3, 3
    order = sorted(range(len(samples)), key=lambda i: -LENGTHS[i])  # as `pack` lays them out
    start = dict(zip(order, [0, *torch.tensor([LENGTHS[i] for i in order]).cumsum(0).tolist()], strict=False))
    starts = torch.tensor([[start[i] + cut - 1 for i in reversed(range(len(samples)))]]) if some else None
    trained = list(unroll(head, view.embed(packed.tokens), packed, steps, starts))
    rows = committed_rows(samples)
    drafter = drafter_with(policy, samples, rows, head)
    rows.length[:] = cut  # decode from here with the sample's own tokens as guesses
    rows.lengths[:] = cut
    known, cache = torch.zeros_like(rows.length), drafter._cache()
    guess = drafter.first(
        known, rows.tokens, drafter.window.kept, rows.start, rows.length, None, 1.0, cut, rows.capacity, *cache
    )
    for j in range(steps):
        if j:
            place = rows.length[:, None] + j - 1
            ids = rows.tokens.gather(1, place + 1)
            guess = drafter.next(ids, guess.hidden, place, None, 1.0, rows.capacity, *cache)
        for i in range(len(samples)):
            (entries,), (states,) = trained[j]
            expected = states[entries == start[i] + cut - 1 + j][0]
            torch.testing.assert_close(head.norm(guess.hidden[i, 0]), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_compiled_head_guesses_the_same(policy, samples, monkeypatch):
    """As torch traces and transforms it; the last stage of its compiler, which takes longest, is left out."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    head = EagleHead(HeadConfig.for_target(policy.config))
    noise = gumbel(torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int32), torch.arange(12).view(3, 4), 16)
    rows = committed_rows(samples)
    expected = drafter_with(policy, samples, rows, head).propose(rows, 3, noise, 0.7)
    drafter = drafter_with(policy, samples, rows, head, compiled=True)
    assert drafter.propose(rows, 3, noise, 0.7).tolist() == expected.tolist()


@torch.no_grad()
@pytest.mark.parametrize("stages", [(14,), (1, 2, 5, 6, 14), (4, 4, 9, 14)])
def test_catching_up_in_stages_gives_the_same_guesses(policy, samples, stages):
    """After plain decoding or in several passes, the head's cache is that of one pass from nothing."""
    head = EagleHead(HeadConfig.for_target(policy.config))
    whole = committed_rows(samples)
    expected = drafter_with(policy, samples, whole, head).propose(whole, 4, None, 1.0)
    rows = committed_rows(samples)
    drafter = drafter_with(policy, samples, rows, head)
    for stage in stages:
        length = torch.tensor(LENGTHS).clamp(max=stage)
        rows.length[:], rows.lengths[:] = length, length.numpy()
        guesses = drafter.propose(rows, 4, None, 1.0)  # guessed entries are overwritten by later stages
    assert guesses.tolist() == expected.tolist()


def test_packing_keeps_rollouts_apart_and_whole(samples):
    packed = pack(samples, width=16)
    assert packed.tokens.shape == (2, 16)
    assert int((packed.document >= 0).sum()) == sum(LENGTHS)
    assert int(packed.learn.sum()) == sum(n - 2 for n in LENGTHS)  # entries 1..n-2 predict sampled tokens 3..n


def test_the_buffer_is_bounded_in_tokens_and_age(samples):
    buffer = FeatureBuffer(max_tokens=20, max_age=2)
    for sample in samples:
        buffer.add(sample.tokens, sample.features, sample.prompt)
    assert buffer.tokens == sum(len(s.features) for s in buffer.samples) <= 20
    buffer.advance()
    buffer.add(samples[2].tokens, samples[2].features, 3)
    assert len({s.version for s in buffer.samples}) == 2
    buffer.advance()
    assert {s.version for s in buffer.samples} == {1}
    buffer.advance()
    assert not buffer.samples and buffer.tokens == 0
