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
from spec_rollout.engine.support import attention_layers
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
    cache = 2 * attention_layers(config) * width + 4 * config.hidden_size + 2 * width
    logits = slots * (gamma + 1) * config.vocab_size * 8 + slots * gamma * config.vocab_size * 4
    at_once = max(PREFILL_TOKENS, slots * (gamma + 1))
    layer = 2 * config.intermediate_size + 6 * config.hidden_size
    passing = at_once * ((config.num_hidden_layers + 1) * config.hidden_size + layer) * 4
    return slots * tokens * (cache * 4 + 24) + logits + passing + 2 * 2**24 + recurrent(slots, gamma, config)


def recurrent(slots: int, gamma: int, config) -> int:
    """The rows on recurrent layers, for the gated delta rule; 0 without any."""
    layers = config.num_hidden_layers - attention_layers(config)
    if not layers:
        return 0
    heads, keys, values = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    channels = 2 * config.linear_num_key_heads * keys + heads * values
    taps = config.linear_conv_kernel_dim
    state = heads * keys * values
    chunks = max(PREFILL_TOKENS, 64 * slots) * heads * (6 * 64 + 6 * keys + 8 * values)
    kept = layers * (state + (taps - 1) * channels) + layers * (gamma + taps) * 3 * channels
    return 4 * (slots * (kept + state) + chunks)


LLAMA = ("llama", {"num_hidden_layers": 4})
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"] * 3,
    "num_hidden_layers": 6,
    "head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
QWEN = ("qwen3_5_text", HYBRID)


@pytest.mark.parametrize(
    ("policy", "slots", "prompt", "new", "share"),
    [(LLAMA, 16, 24, 400, 0.04), (LLAMA, 48, 90, 60, 0.25), (QWEN, 40, 90, 60, 0.25)],  # many end before 400 tokens
)
def test_peak_memory_is_bounded(policy, slots, prompt, new, share):
    name, options = policy
    sizes = {"vocab_size": 2003, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 512}
    model = make_policy(name, **sizes, **options)
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
    assert limit * share < memory.peak < limit * share * 4
