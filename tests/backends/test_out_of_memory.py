"""Memory that runs out in a rollout: it says what to lower, leaves all as it was, and can be asked for again."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.config import SpecConfig
from spec_rollout.engine.out_of_memory import is_out_of_memory, what_to_lower
from spec_rollout.records import RolloutMemoryError, SamplingParams
from tests.engine.test_memory import Memory
from tests.tiny import PROMPTS, assert_same, make_policy

PARAMS = SamplingParams(max_new_tokens=60)
TRL = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
)


class Bounded(Memory):
    """As an allocator with so many bytes left, which raises what torch's own raise."""

    def __init__(self, model, left: int, error: type, message: str):
        super().__init__([*model.parameters(), *model.buffers()])
        self.left, self.error = (
            left,
            error("CUDA out of memory. Tried to allocate 9 GiB" if message == "" else message),
        )

    def _see(self, storage):
        before = self.now
        super()._see(storage)
        if self.now > max(before, self.left):
            raise self.error


KINDS = {"cuda": (torch.OutOfMemoryError, ""), "cpu": (RuntimeError, TRL)}


def backend_for(model, **options) -> EmbeddedBackend:
    options = {"max_cache_gib": 1.0, "draft_ngrams": False, "draft_refresh": False} | options
    return EmbeddedBackend(model, SpecConfig(num_speculative_tokens=0, **options))


def test_torchs_own_error_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_to_lower_and_goes_on_with_less(kind):
    model = make_policy("llama", max_position_embeddings=128).train()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    backend = backend_for(model)
    backend.generate([[1]], SamplingParams(max_new_tokens=2))  # proven and weighed
    expected = backend.generate(PROMPTS * 8, PARAMS)
    before, own = torch.get_rng_state(), model.config._attn_implementation
    with Bounded(model, 2**20, *KINDS[kind]) as memory:
        with pytest.raises(
            RolloutMemoryError, match=r"Lower max_cache_gib \(.* took the most, 0\.00\d+ GiB"
        ) as caught:
            backend.generate(PROMPTS * 8, PARAMS)
        assert isinstance(caught.value.__cause__, KINDS[kind][0])
        assert memory.now < 2**16  # it has been given back, even while the error is at hand
    assert backend.engine.cache.keys == []
    assert model.training and model.config._attn_implementation == own and torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, weights[name]) and p.requires_grad for name, p in model.named_parameters())
    backend.config.max_cache_gib, backend.config.max_slots = 2**18 / 2**30, 8
    with Bounded(model, 2**20, *KINDS[kind]):
        drawn = backend.generate(PROMPTS * 8, PARAMS)
    assert_same(drawn, expected)


def test_the_largest_is_named():
    error = torch.OutOfMemoryError("CUDA out of memory")
    sizes = {"max_cache_gib": 2**30, "max_slots": 2**29, "max_feature_tokens": 3 * 2**30}
    message = str(what_to_lower(error, sizes))
    assert "Lower max_feature_tokens (" in message and "took the most, 3 GiB" in message
    assert "max_cache_gib 1 GiB" in message and "max_slots 0.5 GiB" in message
    assert "Lower max_slots" in str(what_to_lower(MemoryError(), {"max_slots": 5}))


def test_a_single_row_can_only_be_shorter():
    model = make_policy("llama", num_hidden_layers=12, max_position_embeddings=128)
    backend = backend_for(model)
    backend.generate([[1]], SamplingParams(max_new_tokens=2))
    with Bounded(model, 2**17, *KINDS["cpu"]), pytest.raises(RolloutMemoryError, match="Lower max_completion_length"):
        backend.generate([[1, 2]], SamplingParams(max_new_tokens=90))


def test_features_are_counted():
    model = make_policy("llama")
    backend = EmbeddedBackend(model, SpecConfig(num_speculative_tokens=2, draft_ngrams=False))
    backend.generate(PROMPTS, SamplingParams(max_new_tokens=30))
    assert backend.engine.beside() == {
        "max_feature_tokens": sum(s.features.nbytes for s in backend.learner.buffer.samples)
    }
    backend.engine.beside = lambda: {"max_feature_tokens": 2**33}
    with Bounded(model, 2**17, *KINDS["cuda"]), pytest.raises(RolloutMemoryError, match="max_feature_tokens .* 8 GiB"):
        backend.generate(PROMPTS, SamplingParams(max_new_tokens=80))


def test_a_probe_that_runs_out_is_no_fault_of_the_model():
    model = make_policy("llama")
    with Bounded(model, 2**12, *KINDS["cpu"]), pytest.raises(RolloutMemoryError):
        backend_for(model).generate(PROMPTS, SamplingParams(max_new_tokens=9))


def test_a_process_with_a_bound_on_its_memory():
    """Of its address space, so that it is torch's own allocator that refuses."""
    script = textwrap.dedent("""
        import resource
        from pathlib import Path
        import torch
        from spec_rollout.config import SpecConfig
        from spec_rollout.engine.engine import RolloutEngine
        from spec_rollout.records import RolloutMemoryError, SamplingParams
        from tests.tiny import make_policy

        torch.set_num_threads(1)
        model = make_policy("llama", max_position_embeddings=2**12, num_hidden_layers=8, head_dim=64)
        config = SpecConfig(num_speculative_tokens=0, max_slots=64, max_cache_gib=64.0)
        engine = RolloutEngine(model, config)
        prompts = [[i % 50 + 1] * 1000 for i in range(64)]
        params = SamplingParams(max_new_tokens=40)
        expected = engine.generate(prompts[:2], params)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**26, resource.RLIM_INFINITY))
        try:
            engine.generate(prompts, params)
        except RolloutMemoryError as error:
            print(error)
        engine.config.max_slots = 2
        drawn = engine.generate(prompts[:2], params)
        print([c.token_ids for c in drawn] == [c.token_ids for c in expected])
    """)
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    message, same = found.stdout.splitlines() or (found.stderr, "")
    assert "Lower max_cache_gib" in message and "can't allocate memory" in message and same == "True", found.stderr
