"""Two-stage Gumbel-max: the law, what it depends on, and how often two distributions draw the same."""

import math

import pytest
import torch

from spec_rollout.engine.gumbel_max import draw, draw_among, noise_width
from spec_rollout.engine.noise import gumbel, request_keys
from tests.engine.test_law import FALSE_ALARM, p_value
from tests.tiny import gumbel_max

pytestmark = pytest.mark.any_device

DRAWS = 20000


def noise(draws: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    """[draws, N]"""
    keys = torch.tensor(request_keys((seed,), draws), dtype=torch.int32)
    return gumbel(keys, torch.zeros(draws, 1, dtype=torch.int64), noise_width(vocab_size))[:, 0]


def scores(vocab_size: int, spread: float = 1.5, seed: int = 0) -> torch.Tensor:
    return spread * torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed))


def fits(tokens: torch.Tensor, z: torch.Tensor) -> float:
    expected = z.double().softmax(-1) * len(tokens)
    counts = torch.bincount(tokens, minlength=len(z)).double()
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
    return p_value(float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1)


@pytest.mark.parametrize("vocab_size", [2, 3, 4, 5, 7, 9, 10, 16, 17, 30])
def test_law(vocab_size):
    """Also where the last block is short, and with tokens filtered out."""
    for seed in range(2):
        z = scores(vocab_size, seed=seed)
        if seed and vocab_size > 4:
            z[vocab_size // 3 : 2 * vocab_size // 3] = -torch.inf
        tokens = draw(z.expand(DRAWS, -1), noise(DRAWS, vocab_size, seed))[0]
        assert fits(tokens, z) > FALSE_ALARM


def test_control_another_law_is_rejected():
    z = scores(10)
    assert fits(draw(z.expand(DRAWS, -1), noise(DRAWS, 10))[0], 1.1 * z) < FALSE_ALARM


@pytest.mark.parametrize("vocab_size", [1, 2, 5, 64, 97, 1000])
def test_definition(vocab_size):
    """Token, margin and normaliser, as the formula written out gives them."""
    keys = request_keys((3,), 20)
    z = torch.stack([scores(vocab_size, seed=i) for i in range(20)])
    gumbels = gumbel(torch.tensor(keys, dtype=torch.int32), torch.full((20, 1), 5), noise_width(vocab_size))[:, 0]
    token, margin, normaliser = draw(z, gumbels)
    torch.testing.assert_close(normaliser, z.logsumexp(-1))
    for row, key in enumerate(keys):
        expected, blocks, tokens = gumbel_max(z[row], key, 5)
        inside = tokens[blocks.index(max(blocks))]
        ranked = (sorted(x, reverse=True) for x in (blocks, inside))
        leads = [s[0] - s[1] for s in ranked if len(s) > 1]
        assert int(token[row]) == expected
        assert float(margin[row]) == pytest.approx(min(leads, default=math.inf), abs=1e-4)


def test_without_noise_the_best_score_wins_and_the_lower_of_two_equals():
    z = torch.tensor([[0.0, 3.0, 1.0, 3.0], [2.0, -torch.inf, -torch.inf, -torch.inf], [5.0, 1.0, 4.5, 2.0]])
    token, margin, normaliser = draw(z, None)
    assert token.tolist() == [1, 0, 0] and margin.tolist() == [0.0, torch.inf, 0.5]
    torch.testing.assert_close(normaliser, z.logsumexp(-1))


def test_what_is_filtered_out_never_wins_whatever_its_noise():
    z = torch.full((100, 9), -torch.inf)
    z[:, 4] = 1.0
    token, margin, normaliser = draw(z, noise(100, 9))
    assert (token == 4).all() and (margin > 50).all() and (normaliser == 1).all()


def test_scores_far_apart():
    """Blocks whose weights vanish beside the best one's lose, and nothing turns to NaN."""
    z = torch.linspace(-1e4, 0, 100).expand(50, -1)
    token, margin, normaliser = draw(z, noise(50, 100))
    assert (token == 99).all() and not margin.isnan().any() and normaliser.abs().max() < 1e-6


def test_the_work_is_that_of_the_square_root():
    assert noise_width(151936) == 780 and noise_width(4) == 4 and noise_width(1) == 2


@pytest.mark.parametrize("vocab_size", [5, 97, 1000])
def test_among_all_tokens_it_is_the_same_sample(vocab_size):
    z, gumbels = torch.stack([scores(vocab_size, seed=i) for i in range(50)]), noise(50, vocab_size)
    token = draw(z, gumbels)[0]
    assert torch.equal(draw_among(z.clone(), gumbels, torch.arange(vocab_size), vocab_size), token)
    assert torch.equal(draw_among(z.clone(), gumbels, None, vocab_size), token)
    assert torch.equal(draw_among(z, None, None, vocab_size), z.argmax(-1))


@pytest.mark.parametrize("per_row", [False, True])
def test_among_some_tokens_it_is_their_law(per_row):
    ids = torch.tensor([2, 3, 17, 40, 41, 42, 96])
    ids = ids.expand(DRAWS, -1) if per_row else ids
    z = scores(7)
    chosen = draw_among(z.repeat(DRAWS, 1), noise(DRAWS, 97), ids, 97)
    assert fits(chosen, z) > FALSE_ALARM


def test_among_some_tokens_the_target_is_matched():
    """Where the tokens left out are unlikely, the choice is the target's."""
    ids = torch.arange(0, 400, 3)
    z = scores(400).index_fill(0, torch.tensor([i for i in range(400) if i % 3]), -20.0)
    gumbels = noise(2000, 400)
    chosen = ids[draw_among(z[ids].repeat(2000, 1), gumbels, ids, 400)]
    assert (chosen == draw(z.expand(2000, -1), gumbels)[0]).float().mean() > 0.999


@pytest.mark.parametrize("off", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("spread", [2.0, 6.0])
def test_two_distributions_often_draw_the_same(off, spread):
    """As often, to within 3 %, as with one number per token; always, if they are equal."""
    size = 400
    z = scores(size, spread)
    other = z + off * scores(size, 1.0, seed=1)
    gumbels = noise(DRAWS, size)
    agreed = (draw(z.expand(DRAWS, -1), gumbels)[0] == draw(other.expand(DRAWS, -1), gumbels)[0]).double().mean()
    # with one number per token, the token v is drawn twice with probability 1 / Σ_w max(p_w / p_v, q_w / q_v)
    p, q = z.double().softmax(0), other.double().softmax(0)
    flat = (1 / torch.maximum(p / p[:, None], q / q[:, None]).sum(1)).sum()
    assert agreed > flat - 0.03
    assert off or agreed == 1
