"""The counter-based generator and the Gumbel noise made from it."""

import math

import numpy as np
import pytest
import torch

import tests.tiny
from spec_rollout.engine.noise import NoiseWindow, gumbel, request_keys, threefry
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.transfers import on_both_sides
from spec_rollout.records import Request

pytestmark = pytest.mark.any_device

KNOWN_ANSWERS = [  # of threefry2x32-20, from Random123's kat_vectors: counter, key, result
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]


def words(pair) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor([word], dtype=torch.int64).to(torch.int32) for word in pair)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter, key, result):
    got = threefry(words(key), words(counter))
    assert tuple(int(word) & 0xFFFFFFFF for word in got) == result


def test_threefry_broadcasts_and_leaves_its_arguments():
    key = (torch.arange(3, dtype=torch.int32)[:, None], torch.full((3, 1), 7, dtype=torch.int32))
    counter = (torch.arange(5, dtype=torch.int32), torch.tensor(9, dtype=torch.int32))
    before = [x.clone() for x in (*key, *counter)]
    together = threefry(key, counter)
    assert all(torch.equal(a, b) for a, b in zip(before, (*key, *counter), strict=True))
    for row in range(3):
        for column in range(5):
            alone = threefry((key[0][row], key[1][row]), (counter[0][column : column + 1], counter[1]))
            assert [int(x[row, column]) for x in together] == [int(x) for x in alone]


def sample(rows: int = 20, positions: int = 50, vocab_size: int = 1001) -> torch.Tensor:
    keys = torch.tensor(request_keys((5, 1), rows), dtype=torch.int32)
    return gumbel(keys, torch.arange(positions).expand(rows, -1), vocab_size)


def test_moments():
    """Mean γ and variance π²/6 of the standard Gumbel law, within five standard errors."""
    noise = sample().double()
    n = noise.numel()
    variance = math.pi**2 / 6
    fourth = 27 / 5 * variance**2  # central moment: excess kurtosis 12/5
    assert abs(noise.mean() - np.euler_gamma) < 5 * math.sqrt(variance / n)
    assert abs(noise.var() - variance) < 5 * math.sqrt((fourth - variance**2) / n)


def test_uniformity():
    """exp(-exp(-G)) is uniform: 1000 cells, χ² within five standard deviations of its law."""
    uniform = (-(-sample().double()).exp()).exp()
    counts = torch.histc(uniform, 1000, 0, 1)
    expected = uniform.numel() / 1000
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert abs(statistic - 999) < 5 * math.sqrt(2 * 999)


def test_extremes_are_finite_and_the_winners_are_fine_grained():
    """The largest noise of a vocabulary, which decides, keeps its precision: no two alike among 40 000."""
    noise = sample(40, 1000, 256)
    assert noise.isfinite().all() and noise.max() <= 22.2 and noise.min() > -3
    winners = noise.amax(-1).flatten()
    assert len(winners.unique()) > 0.99 * len(winners)


@pytest.mark.parametrize("axis", ["key", "position", "token"])
def test_nothing_is_shared(axis):
    """Neighbours along each axis are different and uncorrelated."""
    noise = sample(64, 64, 128).double()
    dim = {"key": 0, "position": 1, "token": 2}[axis]
    size = noise.shape[dim]
    a, b = noise.narrow(dim, 0, size - 1).flatten(), noise.narrow(dim, 1, size - 1).flatten()
    assert float((a == b).double().mean()) < 1e-4  # by chance alone
    correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(len(a))


def test_both_halves_of_the_vocabulary_are_independent():
    """Tokens v and v + V/2 take the two words of one block."""
    noise = sample(64, 64, 128).double()
    correlation = torch.corrcoef(torch.stack([noise[..., :64].flatten(), noise[..., 64:].flatten()]))[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(64 * 64 * 64)


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 8, 97])
def test_depends_on_key_position_and_token_alone(vocab_size):
    """Not on the batch, nor on how many positions are asked for at once."""
    keys = torch.tensor(request_keys((0,), 4), dtype=torch.int32)
    positions = torch.tensor([[3, 4, 5], [0, 1, 2], [100, 7, 3], [3, 4, 5]])
    together = gumbel(keys, positions, vocab_size)
    assert together.shape == (4, 3, vocab_size) and together.dtype == torch.float32
    for row in range(4):
        for place in range(3):
            alone = gumbel(keys[row : row + 1], positions[row : row + 1, place : place + 1], vocab_size)[0, 0]
            assert torch.equal(together[row, place], alone)


@pytest.mark.parametrize("word", [0, 1])
def test_either_word_of_the_key_matters(word):
    key = torch.tensor([[5, 9]], dtype=torch.int32)
    other = key.clone()
    other[0, word] += 1
    noise, moved = (gumbel(k, torch.arange(20)[None], 50).flatten() for k in (key, other))
    assert not (noise == moved).any()


def test_keys():
    """Distinct, the same for the same seed, stable when entries are added, and apart for every other seed."""
    seeds = [(), (0,), (1,), (1, 0), (0, 1), (1, 0, 0), (2, 3, 5), (2**40, 1), (2**63,)]
    keys = {seed: request_keys(seed, 2000) for seed in seeds}
    flat = [key for some in keys.values() for key in some]
    assert len(set(flat)) == len(flat)
    assert all(-(2**31) <= word < 2**31 for key in flat for word in key)
    assert request_keys([1, 0], 2000) == keys[1, 0] and request_keys((1, 0), 5) == keys[1, 0][:5]
    assert request_keys((np.int64(1), 0), 5) == keys[1, 0][:5]
    with pytest.raises(ValueError, match="non-negative"):
        request_keys((1, -1), 1)


@pytest.mark.parametrize("ahead", [0, 1, 5, 32])
def test_window(ahead, monkeypatch):
    """Drawn ahead or not, through admissions, moves and uneven progress, it is the same noise."""
    monkeypatch.setattr("spec_rollout.engine.noise.AHEAD", ahead)
    generator = np.random.default_rng(0)
    rows = Rows(4, 200, 7, tests.tiny.DEVICE)
    waiting = [
        Request(i, [1] * int(generator.integers(1, 9)), key, 99) for i, key in enumerate(request_keys((1,), 40))
    ]
    window = NoiseWindow(rows, 6)
    taken = 0
    while waiting:
        free = min(4 - rows.count, int(generator.integers(0, 3)))
        if rows.count + free == 0:
            continue
        entering, waiting = waiting[:free], waiting[free:]
        if entering:
            rows.fill(rows.count, entering)
            window.admit(rows.count, rows.count + len(entering))
            rows.count += len(entering)
        for _ in range(int(generator.integers(1, 6))):
            width = int(generator.integers(1, 9))
            steps = rows.progress()[:, None] + torch.arange(width)
            assert torch.equal(window.take(rows, width), gumbel(rows.key[: rows.count], steps, 6))
            emitted = generator.integers(1, width + 1, rows.count)
            rows.lengths[: rows.count] += emitted
            rows.length[: rows.count] += torch.from_numpy(emitted)
            taken += 1
        gone = int(generator.integers(0, rows.count))  # the last row moves into the slot of one that ends
        if gone != rows.count - 1:
            source, target = (on_both_sides([slot], rows.device) for slot in (rows.count - 1, gone))
            rows.copy(source, target)
            window.copy(source, target)
        rows.count -= 1
    assert taken > 50


def test_a_window_for_a_large_vocabulary_stays_small(monkeypatch):
    monkeypatch.setattr("spec_rollout.engine.noise.AHEAD_NUMBERS", 100)
    rows = Rows(3, 10, 33, tests.tiny.DEVICE)
    assert NoiseWindow(rows, 33).window.numel() <= 100
