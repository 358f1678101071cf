"""What a rollout takes beside the policy stays under the bound that docs/speed.md states."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spec_rollout.config import SpecConfig
from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.prefill import PREFILL_TOKENS
from spec_rollout.gamma import FixedGamma
from spec_rollout.records import SamplingParams
from tests.tiny import make_policy


class Memory(TorchDispatchMode):
    """Bytes of the tensors made within it: now, and at most so far."""

    def __init__(self, known):
        super().__init__()
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage):
        if storage._cdata not in self.live:
            self.live[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key):
        self.now -= self.live.pop(key)


def bound(slots: int, tokens: int, gamma: int, model) -> int:
    """The table of docs/speed.md, without what outlives a rollout, and the rows' tokens and log-probs."""
    config = model.config
    width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    cache = 2 * config.num_hidden_layers * width + 4 * config.hidden_size + 2 * width
    logits = slots * (gamma + 1) * config.vocab_size * 8 + slots * gamma * config.vocab_size * 4
    at_once = max(PREFILL_TOKENS, slots * (gamma + 1))
    layer = 2 * config.intermediate_size + 6 * config.hidden_size
    passing = at_once * ((config.num_hidden_layers + 1) * config.hidden_size + layer) * 4
    return slots * tokens * (cache * 4 + 24) + logits + passing + 2 * 2**24


@pytest.mark.parametrize(("slots", "prompt", "new"), [(16, 24, 400), (48, 90, 60)])
def test_peak_memory_is_bounded(slots, prompt, new):
    model = make_policy(
        "llama",
        vocab_size=2003,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        max_position_embeddings=512,
    )
    gamma = 3
    drafter = EagleDrafter(EagleHead(HeadConfig.for_target(model.config)), PolicyView(model))
    drafter.ready = True
    config = SpecConfig(max_slots=slots, max_num_speculative_tokens=gamma)
    engine = RolloutEngine(model, config, drafter=drafter, controller=FixedGamma(gamma))
    prompts = [[(i + j) % 2003 for j in range(prompt)] for i in range(slots)]
    with Memory([*model.parameters(), *model.buffers(), *drafter.head.parameters()]) as memory:
        engine.generate(prompts, SamplingParams(max_new_tokens=new, eos_token_ids=range(0, 2003, 5)))  # soon
    assert sum(step.gamma for step in engine.stats.steps) > 0
    limit = bound(slots, prompt + new + gamma + 1 + 32, gamma, model)
    assert limit / 4 < memory.peak < limit
