"""What this device can do at most, measured by a copy and a matrix product, and what the parts of a rollout hold."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.learner import DraftLearner
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.support import attention_layers
from spec_rollout.simulate.cost_file import Limits

COPY_BYTES = (2**24, 2**30)
"""Least and most bytes of the copy; in between it has the size of the weights, which a cache may hold or not."""
MATRIX = {"cpu": 1024, "cuda": 8192}
REPEATS = 7


def device_limits(model: nn.Module, drafter: EagleDrafter) -> Limits:
    """Bandwidth and arithmetic of the policy's device in its dtype, and what a pass of policy and head needs."""
    weight = model.get_input_embeddings().weight
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Limits(
        parameters=_multiplied(model),
        draft_parameters=sum(p.numel() for p in drafter.head.parameters() if p.dim() == 2) + _borrowed(drafter),
        kv_bytes_per_token=2 * attention_layers(config) * heads * width * weight.itemsize,
        bandwidth=_bandwidth(weight.device, _bytes(model.parameters())),
        flops=_flops(weight.device, weight.dtype),
        bytes_per_parameter=weight.itemsize,
    )


def memory(engine: RolloutEngine, drafter: EagleDrafter, learner: DraftLearner) -> dict[str, int]:
    """Bytes of the policy's weights and of what stands beside them: of slots, the most that they took."""
    trainer = learner.trainer
    state = [v for o in trainer.optimizers for s in o.state.values() for v in s.values() if isinstance(v, Tensor)]
    return {
        "weights": _bytes(engine.target.model.parameters()),
        "kv_cache": engine.stats.cache_bytes,
        "draft": _bytes(drafter.head.parameters()),
        "features": _bytes(t for s in learner.buffer.samples for t in (s.tokens, s.features)),
        "draft_training": _bytes([*trainer.head.parameters(), *trainer.average.parameters(), *state]),
    }


def _multiplied(model: nn.Module) -> int:
    """Parameters that every token passes through: not an embedding that is only looked up."""
    total = sum(p.numel() for p in model.parameters())
    looked_up, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    return total if output is None or output.weight is looked_up else total - looked_up.numel()


def _borrowed(drafter: EagleDrafter) -> int:
    """Entries of the policy's output rows that the head guesses through; none if it has its own."""
    return 0 if drafter.head.own_output is not None else drafter.view.output_rows().numel()


def _bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second, read and written, of a copy of `size` bytes."""
    size = min(max(size, COPY_BYTES[0]), COPY_BYTES[1])
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _least_seconds(lambda: target.copy_(source), device)


def _flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product."""
    n = MATRIX.get(device.type, MATRIX["cpu"])
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _least_seconds(lambda: a @ b, device)


def _least_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The fastest of a few calls: a limit is what was reached once."""
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _bytes(tensors) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)
