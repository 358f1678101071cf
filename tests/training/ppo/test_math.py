"""Advantages and losses of PPO against a NumPy reference that walks token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_rollout.training.ppo.advantages import (
    explained_variance,
    generalized_advantages,
    token_rewards,
    whiten,
)
from spec_rollout.training.ppo.loss import KLController, policy_loss, value_loss

B, T = 3, 6


def arrays(seed: int, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, T)) for _ in range(count)]


def masks(seed: int) -> np.ndarray:
    """Completions of every length, 0 included, padded on the right, with tokens of tools inside."""
    rng = np.random.default_rng(seed + 1)
    lengths = rng.integers(0, T + 1, size=B)
    return ((np.arange(T) < lengths[:, None]) & (rng.random((B, T)) > 0.3)).astype(float)


def tensors(*given: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(x) for x in given]


def reference_advantages(rewards, values, mask, gamma, lam):
    """A_t as the discounted sum of the later δ, over the row's own tokens alone."""
    advantages = np.zeros_like(rewards)
    for row in range(B):
        own = np.flatnonzero(mask[row])
        r, v = rewards[row, own], np.append(values[row, own], 0.0)
        deltas = r + gamma * v[1:] - v[:-1]
        for i, t in enumerate(own):
            advantages[row, t] = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[i:]))
    return advantages


seeds = st.integers(0, 2**32 - 1)
rates = st.floats(0.0, 1.0)


@settings(max_examples=60, deadline=None)
@given(seeds, rates, rates)
def test_advantages(seed, gamma, lam):
    rewards, values = arrays(seed, 2)
    mask = masks(seed)
    advantages, returns = generalized_advantages(*tensors(rewards, values, mask), gamma, lam)
    expected = reference_advantages(rewards, values, mask, gamma, lam)
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(returns.numpy(), (expected + values) * mask, atol=1e-12)


def test_without_discount_the_return_is_the_rewards_to_come():
    rewards, values = arrays(5, 2)
    _, returns = generalized_advantages(*tensors(rewards, values, np.ones((B, T))), 1.0, 1.0)
    np.testing.assert_allclose(returns.numpy(), rewards[:, ::-1].cumsum(axis=1)[:, ::-1], atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_token_rewards(seed):
    (kl,) = arrays(seed, 1)
    mask, scores = masks(seed), np.random.default_rng(seed).normal(size=B)
    expected = -0.3 * kl * mask
    for row in range(B):
        own = np.flatnonzero(mask[row])
        if len(own):
            expected[row, own[-1]] += scores[row]
    got = token_rewards(*tensors(scores, kl), 0.3, torch.from_numpy(mask))
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_whitening_and_explained_variance(seed):
    x, y = arrays(seed, 2)
    mask = masks(seed)
    mask[0, :3] = 1
    own, other = x[mask > 0], y[mask > 0]
    white = whiten(*tensors(x, mask)).numpy()
    np.testing.assert_allclose(white[mask > 0], (own - own.mean()) / (own.std() + 1e-8), atol=1e-9)
    assert not white[mask == 0].any()
    explained = explained_variance(*tensors(x, y, mask)).item()
    assert explained == pytest.approx(1 - (other - own).var() / other.var())


def test_ranks_are_whitened_together():
    (x,) = arrays(7, 1)
    mask = masks(7)
    mask[:, 0] = 1
    together = whiten(*tensors(x, mask))
    ranks = [tensors(x[rank : rank + 1], mask[rank : rank + 1]) for rank in range(B)]
    sums: list[list[torch.Tensor]] = [[] for _ in ranks]
    for own, (part, kept) in zip(sums, ranks, strict=True):  # what each rank would send first
        own.append(torch.stack([(part * kept).sum(), kept.sum()]))
    total, count = sum(own[0] for own in sums)
    squares = sum((((part - total / count) ** 2) * kept).sum() for part, kept in ranks)
    for rank, (part, kept) in enumerate(ranks):
        replies = iter([torch.stack([total, count]), squares])
        apart = whiten(part, kept, lambda _, replies=replies: next(replies))
        torch.testing.assert_close(apart, together[rank : rank + 1])


def test_nothing_to_explain_and_nothing_to_whiten():
    ones, zeros = torch.ones(2, 3), torch.zeros(2, 3)
    assert explained_variance(zeros, ones, ones).isnan()
    assert not whiten(ones, ones).any() and not whiten(ones, zeros).any()


@settings(max_examples=60, deadline=None)
@given(seeds, st.floats(0.01, 0.9), st.floats(0.01, 2.0))
def test_policy_loss(seed, low, high):
    new, old, advantages = arrays(seed, 3)
    loss, clipped = policy_loss(*tensors(new, old, advantages), low, high)
    for at in np.ndindex(B, T):
        ratio = np.exp(new[at] - old[at])
        bounded = min(max(ratio, 1 - low), 1 + high)
        assert loss[at].item() == pytest.approx(-min(ratio * advantages[at], bounded * advantages[at]))
        outside = ratio > 1 + high if advantages[at] > 0 else ratio < 1 - low
        assert clipped[at].item() == outside


@settings(max_examples=60, deadline=None)
@given(seeds, st.one_of(st.none(), st.floats(0.01, 2.0)))
def test_value_loss(seed, cliprange):
    values, old, returns = arrays(seed, 3)
    loss, clipped = value_loss(*tensors(values, old, returns), cliprange)
    for at in np.ndindex(B, T):
        free = (values[at] - returns[at]) ** 2
        move = values[at] - old[at]
        if cliprange is None or abs(move) <= cliprange:
            held = free
        else:
            held = (old[at] + np.sign(move) * cliprange - returns[at]) ** 2
        assert loss[at].item() == pytest.approx(0.5 * max(free, held))
        assert clipped[at].item() == (held > free)


def test_a_clipped_token_has_no_gradient():
    new = torch.tensor([[0.5, 0.05, -0.5]], requires_grad=True)
    loss, clipped = policy_loss(new, torch.zeros(1, 3), torch.ones(1, 3), 0.2, 0.2)
    loss.sum().backward()
    assert clipped.tolist() == [[True, False, False]]
    assert (new.grad == 0).tolist() == [[True, False, False]]


@pytest.mark.parametrize(("kl", "error"), [(9.0, 0.2), (6.6, 0.1), (6.0, 0.0), (5.4, -0.1), (0.0, -0.2)])
def test_the_coefficient_follows_ziegler(kl, error):
    controller = KLController(0.5, target=6.0, horizon=1000)
    controller.update(kl, 64)
    assert controller.coef == pytest.approx(0.5 * (1 + error * 64 / 1000))


def test_a_fixed_coefficient_stays():
    controller = KLController(0.5)
    controller.update(99.0, 64)
    assert controller.coef == 0.5
