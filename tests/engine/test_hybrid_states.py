"""Every slot's recurrent state is that of its row's committed tokens, as exact as a prefill of them would leave it."""

import copy
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from spec_rollout.config import SpecConfig
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.support import cache_argument
from spec_rollout.records import SamplingParams
from tests.engine.test_hybrids import drawn, mixed
from tests.engine.watched import Watched, assert_alike
from tests.tiny import PROMPTS, Scripted, policy
from tests.tiny_configs import HYBRIDS


class Checked(Watched):
    """A rollout that compares every active slot with a fresh prefill whenever the rows have changed."""

    checks = 0

    def check(self) -> None:
        for slot in range(self.rows.count):
            length = int(self.rows.length[slot])
            for mine, theirs in self.both(slot, self.rows.tokens[slot, :length]):
                assert_alike(mine, theirs)
                Checked.checks += 1

    def both(self, slot: int, tokens: torch.Tensor):
        """What the slot holds, and what transformers' own cache holds after a pass over the row's tokens alone."""
        model, states = self.target.model, self.cache.states
        if not len(tokens):
            for buffer in states.buffers:
                yield buffer[slot], torch.zeros_like(buffer[slot])
            return
        fresh = DynamicCache(config=model.config)
        model(input_ids=tokens[None], use_cache=True, **{cache_argument(model): fresh})
        attention = [layer for layer in fresh.layers if getattr(layer, "keys", None) is not None]
        for mine, theirs in zip(self.cache.keys, [layer.keys for layer in attention], strict=True):
            yield mine[slot, :, : len(tokens)], theirs[0]
        recurrent = {(i, 0): layer for i, layer in enumerate(fresh.layers) if hasattr(layer, "conv_states")}
        recurrent = {key: layer for key, layer in recurrent.items() if layer.conv_states[0] is not None}
        assert states.convolutions.keys() == recurrent.keys()
        for key, layer in recurrent.items():
            mine = states.convolutions[key][slot]
            yield mine, layer.conv_states[0][0, :, -mine.shape[-1] :]
            if layer.recurrent_states[0] is not None:
                yield states.states[key][slot], layer.recurrent_states[0][0]


class InFloat64(TorchFunctionMode):
    """What computes in float32, whatever its weights are, computes in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        wider = [torch.float64 if arg is torch.float32 else arg for arg in args]
        named = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        return func(*wider, **named)


class Exact(Checked):
    """Compares with a prefill in float64, and notes how far from that a prefill in float32 is."""

    exact: ClassVar[torch.nn.Module]
    ours = theirs = 0.0

    def check(self) -> None:
        for slot in range(self.rows.count):
            tokens = self.rows.tokens[slot, : int(self.rows.length[slot])]
            pairs, own = list(self.both(slot, tokens)), self.target.model
            self.target.model = self.exact
            torch.set_default_dtype(torch.float64)
            with InFloat64():
                exact = [true for _, true in self.both(slot, tokens)]
            torch.set_default_dtype(torch.float32)
            self.target.model = own
            for (mine, theirs), true in zip(pairs, exact, strict=True):
                assert true.dtype == torch.float64 or not len(tokens)
                scale = true.abs().max().clamp(min=1e-30)
                Exact.ours = max(Exact.ours, float((mine - true).abs().max() / scale))
                Exact.theirs = max(Exact.theirs, float((theirs - true).abs().max() / scale))


@pytest.mark.parametrize("name", ["qwen3_5_text", "kimi_linear", "lfm2", "granitemoehybrid"])
def test_states_are_as_exact_as_those_of_a_prefill(name, monkeypatch):
    """Neither the recurrence here nor transformers' own is off: both differ from float64 by float32's rounding."""
    Exact.ours = Exact.theirs = 0.0
    Exact.exact = copy.deepcopy(policy(name)).double()
    Exact.exact.config._experts_implementation = "eager"  # which takes float64
    monkeypatch.setattr("spec_rollout.engine.engine.Rollout", Exact)
    engine = RolloutEngine(policy(name), SpecConfig(max_slots=3), drafter=mixed(name), controller=Scripted(3, 0, 5, 1))
    engine.generate(PROMPTS, SamplingParams(max_new_tokens=12))
    assert 0 < Exact.ours < 1e-5 and 0 < Exact.theirs < 1e-5


@pytest.mark.parametrize("slots", [2, 3, 64])
@pytest.mark.parametrize("name", HYBRIDS)
def test_states_equal_a_fresh_prefill(name, slots, monkeypatch):
    Checked.checks = Checked.moves = 0
    expected = [replace(c, token_ids=c.token_ids[:12], logprobs=c.logprobs[:12]) for c in drawn(name)]
    limits = [9, 4, 12, 12, 3, 12, 6]
    monkeypatch.setattr("spec_rollout.engine.engine.Rollout", Checked)
    engine = RolloutEngine(
        policy(name), SpecConfig(max_slots=slots), drafter=mixed(name), controller=Scripted(3, 0, 5, 1)
    )
    got = engine.generate(PROMPTS, SamplingParams(max_new_tokens=12), max_new_tokens=limits)
    assert [c.token_ids for c in got] == [c.token_ids[:n] for c, n in zip(expected, limits, strict=True)]
    assert 1.3 < engine.stats.mean_acceptance_length < 3
    assert Checked.checks > 100 and Checked.moves > 0
