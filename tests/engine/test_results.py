"""What a rollout keeps grows with the tokens that it emits, not with those that it might have emitted."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spec_rollout.config import SpecConfig
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.results import Results
from spec_rollout.records import SamplingParams
from tests.tiny import make_policy

REQUESTS, SLOTS = 60, 2


class Sizes(TorchDispatchMode):
    """The most elements of any tensor of other than model size that is made meanwhile."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return made


def ended(limit: int) -> tuple[int, int, int]:
    """A rollout of many short completions under `limit`: emitted tokens, elements that the results held, and elements
    of the largest tensor there was."""
    model = make_policy("llama", max_position_embeddings=8192)
    params = SamplingParams(max_new_tokens=limit, eos_token_ids=tuple(range(1, 97, 3)))
    held = []
    honest = Results.completions

    def counted(self):
        held.append(sum(part.numel() for parts in (self._tokens, self._logprobs) for part in parts))
        return honest(self)

    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=0, max_slots=SLOTS))
    engine.generate([[1]], SamplingParams(max_new_tokens=1))
    try:
        Results.completions = counted
        with Sizes() as sizes:
            got = engine.generate([[1, 2 + i % 90] for i in range(REQUESTS)], params)
    finally:
        Results.completions = honest
    assert all(c.finish_reason == "eos" for c in got)
    return sum(len(c.token_ids) for c in got), held[0], sizes.largest


def test_results_are_as_large_as_what_was_emitted():
    short, long = ended(200), ended(2000)
    assert short[:2] == long[:2]  # the limit changes nothing
    assert short[1] == 2 * short[0]  # a token and its log-prob each
    # the largest tensors are the cache's, of slots x capacity entries: two heads of eight numbers
    assert long[2] <= SLOTS * 2048 * 2 * 8 < REQUESTS * 2000
