"""The MTP head of a checkpoint: read, run, unrolled, learned and written back."""

import pytest
import torch

import tests.tiny
from spec_rollout.draft.features import Sample
from spec_rollout.draft.mtp import MtpDrafter, MtpHead
from spec_rollout.draft.mtp_names import QWEN, Names
from spec_rollout.draft.packing import pack
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.unroll import unroll
from spec_rollout.engine.rows import Rows
from tests.tiny import VOCAB, policy

LENGTHS = (9, 14, 5)


def random_head(model, names: Names = QWEN) -> MtpHead:
    head = MtpHead(model, names)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in (*head.parameters(), *head.layers.buffers()):
            weight.normal_(0.0, 0.2, generator=generator)
    return head.eval()


@pytest.fixture(scope="module")
def samples():
    torch.manual_seed(1)
    return [Sample(torch.randint(VOCAB, (n + 1,)), torch.randn(n, 2 * 32), 3, 0) for n in LENGTHS]


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_next", "deepseek_v3"])
@pytest.mark.parametrize("some", [False, True])
def test_unrolled_states_are_the_states_of_decoding(name, samples, some):
    """Step j from entry p equals the j-th guess of a row with p + 1 committed tokens and the same tokens after."""
    head, view = random_head(policy(name)), PolicyView(policy(name))
    packed = pack(samples, width=32)
    steps, cut = 3, 3
    order = sorted(range(len(samples)), key=lambda i: -LENGTHS[i])  # as `pack` lays them out
    start = dict(zip(order, [0, *torch.tensor([LENGTHS[i] for i in order]).cumsum(0).tolist()], strict=False))
    starts = torch.tensor([[start[i] + cut - 1 for i in reversed(range(len(samples)))]]) if some else None
    trained = list(unroll(head, view.embed(packed.tokens), packed, steps, starts))
    rows = Rows(len(samples), max(LENGTHS) + 8, VOCAB, tests.tiny.DEVICE)
    rows.count = len(samples)
    drafter = MtpDrafter(head, view)
    drafter.ready = True
    drafter.begin(rows)
    drafter.resize(rows, 0)
    for slot, sample in enumerate(samples):
        rows.tokens[slot, : len(sample.tokens)] = sample.tokens
        drafter.window.kept[slot, : len(sample.features)] = sample.features[:, : drafter.fused_width]
    rows.length[:] = cut
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
            torch.testing.assert_close(guess.hidden[i, 0], expected, atol=1e-5, rtol=1e-4)
