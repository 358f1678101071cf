"""Whole passes through torch's compiler give the same tokens."""

from functools import partial

import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter
from spec_rollout.engine.compiled import NotCompilableError
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import SamplingParams
from tests.tiny import PROMPTS, Scripted, assert_same, make_policy, reference

pytestmark = pytest.mark.any_device

PARAMS = SamplingParams(max_new_tokens=16)


def test_tokens_are_those_of_plain_decoding():
    model = make_policy("gpt2", num_hidden_layers=1)  # which has no lean pass; that one is compiled by halves
    expected = reference(model, PROMPTS, PARAMS)
    config = SpecConfig(max_num_speculative_tokens=3, compile_passes=True)
    engine = RolloutEngine(model, config, drafter=OracleDrafter(expected), controller=Scripted(3))
    assert_same(engine.generate(PROMPTS, PARAMS), expected)
    assert engine.stats.mean_acceptance_length > 3 and engine.target.path == "compiled"


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    engine = RolloutEngine(make_policy("gpt2"), SpecConfig(compile_passes=True))
    with pytest.raises(
        NotCompilableError, match="cannot compile GPT2LMHeadModel .*no compiler here.* C\\+\\+ compiler"
    ):
        engine.generate(PROMPTS[:1], PARAMS)
