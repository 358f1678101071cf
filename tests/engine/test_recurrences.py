"""The names by which models call their recurrences lead through a rollout while it runs, and only its own passes."""

import torch
from transformers import DynamicCache

from spec_rollout.engine import recurrences
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.recurrences import Recurrences
from spec_rollout.engine.support import cache_argument
from tests.tiny import policy


def kernels() -> list:
    return [
        getattr(module, name)
        for model in map(policy, ("qwen3_5_text", "bamba"))
        for module, name in Recurrences(model).places
    ]


def test_the_models_modules_are_left_as_found():
    """Also where two rollouts of one architecture overlap, whichever ends first."""
    before = kernels()
    assert len(before) == 2
    one, other = (Recurrences(policy("qwen3_5_text")).installed() for _ in range(2))
    one.__enter__()
    during = kernels()
    assert during[0] is not before[0] and during[1] is before[1]
    other.__enter__()
    one.__exit__(None, None, None)
    assert kernels() == during
    other.__exit__(None, None, None)
    assert kernels() == before


def test_a_pass_outside_the_rollout_is_not_touched():
    """While a rollout runs, a plain forward of the same model (a reward model's, a near-tie's) is its own."""
    model, ids = policy("qwen3_5_text"), torch.arange(20)[None]
    with torch.no_grad():
        alone = model(ids).logits
        with RolloutEngine(model).target.rollout():
            assert torch.equal(model(ids).logits, alone)
            cache = DynamicCache(config=model.config)
            found = [
                model(ids[:, i : i + 1], use_cache=True, **{cache_argument(model): cache}).logits for i in range(20)
            ]
    torch.testing.assert_close(torch.cat(found, 1), alone, atol=1e-4, rtol=0)
    assert recurrences.CURRENT.get() is None
