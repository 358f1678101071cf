"""What would make the host wait for a GPU in a decode step: one thing, the report of what was emitted."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tests.tiny
from spec_rollout.config import SpecConfig
from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.features import FeatureBuffer
from spec_rollout.draft.ngram_drafter import NgramDrafter
from spec_rollout.draft.ngrams import History
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.transfers import upload
from spec_rollout.records import SamplingParams
from tests.tiny import PROMPTS, Scripted, policy

MOVES = {"cpu", "tolist", "cuda", "tensor", "as_tensor", "asarray", "new_tensor"}
"""Functions that copy between host and device; what `upload` copies is not waited for."""
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}
"""Operations whose result, or the size of it, the host has to know."""

PARAMS = SamplingParams(max_new_tokens=12)


class Waits(TorchDispatchMode):
    """Counts, by name, what would wait on a GPU."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found: Counter[str] = Counter()
        self.functions = Functions(self.found)
        honest = torch.from_numpy  # no mode sees it

        def from_numpy(array):
            self.found["from_numpy"] += sys._getframe(1).f_code is not upload.__code__
            return honest(array)

        monkeypatch.setattr(torch, "from_numpy", from_numpy)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        by_counts = name == "repeat_interleave" and function._overloadname == "Tensor"
        self.found[name] += name in READS or by_mask or by_counts
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """What never reaches a dispatch mode where host and device are one."""

    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.found["index of the host"] += any(isinstance(i, np.ndarray | list) for i in index)
        self.found[name] += name in MOVES and sys._getframe(1).f_code is not upload.__code__
        return function(*args, **(kwargs or {}))


def head(model) -> EagleDrafter:
    view = PolicyView(model)
    drafter = EagleDrafter(EagleHead(HeadConfig.for_target(model.config)).eval(), view, FeatureBuffer(10_000))
    drafter.ready = True
    return drafter


def ngrams(model) -> NgramDrafter:
    history = History(tests.tiny.DEVICE)
    history.add((p, c.token_ids) for p, c in zip(PROMPTS, RolloutEngine(model).generate(PROMPTS, PARAMS), strict=True))
    return NgramDrafter(history, head(model).collector)


def waits_of_steps(model, drafter, params, monkeypatch, **options) -> tuple[list[Counter], RolloutEngine]:
    """What each step waited for, the admission before it included."""
    config = SpecConfig(max_slots=3, **options)
    engine = RolloutEngine(model, config, drafter=drafter, controller=drafter and Scripted(3, 0, 1, 7, 2))
    engine.generate(PROMPTS, params)  # what is made once is there
    waits = Waits(monkeypatch)
    seen = []
    engine.progress = lambda *_: seen.append((waits.found.copy(), engine.stats.near_ties))
    with waits.functions, waits:
        engine.generate(PROMPTS, params, seed=(3,), max_new_tokens=[12, 5, 9, 2, 12, 7, 10])
    pairs = pairwise(seen)  # before the first step the rollout is set up, and near-ties are read again
    return [after - before for (before, ties), (after, ties_then) in pairs if ties == ties_then], engine


@pytest.mark.parametrize("path", ["lean", "transformers"])
@pytest.mark.parametrize("make", [None, head, ngrams])
def test_a_step_waits_once(make, path, monkeypatch):
    """At any γ, whether rows leave, move and enter or not."""
    if path == "transformers":
        monkeypatch.setattr("spec_rollout.engine.lean.choice.family_of", lambda model: None)
    model = policy("qwen3")
    steps, engine = waits_of_steps(model, make and make(model), PARAMS, monkeypatch)
    assert engine.target.path == path
    assert len(steps) > 5 and steps == [Counter(cpu=1)] * len(steps)
    assert len({step.rows for step in engine.stats.steps}) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
        {"repetition_penalty": 1.2},
        {"eos_token_ids": (5, 9)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_however_it_samples(options, monkeypatch):
    model = policy("qwen3")
    params = SamplingParams(max_new_tokens=12, **options)
    steps, _ = waits_of_steps(model, head(model), params, monkeypatch)
    assert len(steps) > 5 and steps == [Counter(cpu=1)] * len(steps)


def test_by_rejection(monkeypatch):
    model = policy("qwen3")
    steps, _ = waits_of_steps(model, head(model), PARAMS, monkeypatch, verification="rejection")
    assert len(steps) > 5 and steps == [Counter(cpu=1)] * len(steps)


@pytest.mark.parametrize(
    ("wait", "name"),
    [
        (lambda x: bool(x[0] > 0), "_local_scalar_dense"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x[x > 1], "index"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: torch.tensor([1]), "tensor"),
        (lambda x: torch.from_numpy(np.arange(2)), "from_numpy"),
        (lambda x: x[[0, 1]], "index of the host"),
    ],
)
def test_what_counts(wait, name, monkeypatch):
    x, waits = torch.arange(4), Waits(monkeypatch)
    with waits.functions, waits:
        upload(np.arange(2), x.device)
        wait(x)
    assert waits.found[name] == 1
