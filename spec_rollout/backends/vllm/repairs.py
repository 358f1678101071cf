"""Faults of vLLM on a CPU that make samples wrong, mended."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CLOSE = 0.004
"""Relative error that rounding may cause: the unit of bfloat16."""


def repair_sampling(device: torch.device) -> None:
    """vLLM 0.31 and 0.32 on a CPU never write the temperature, top-k and top-p of each guess: by rejection sampling
    they verify guesses with what happens to lie in memory, and samples do not have the policy's law."""
    from vllm.v1.sample import rejection_sampler

    if device.type == "cpu" and not _expands(rejection_sampler.expand_batch_to_tokens):
        rejection_sampler.expand_batch_to_tokens = expand


def expand(x: Tensor, ends: Tensor, size: int, replace_from: float = 0, replace_to: float = 0) -> Tensor:
    """Each row's value of `x` [B] for each of its guesses, [size]; row b's guesses end at ends[b]."""
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts, output_size=size)


def _expands(function) -> bool:
    """Whether `function` does what `expand` does, for the types that vLLM gives it."""
    ends = torch.tensor([2, 5], dtype=torch.int32)
    for values in (torch.tensor([0.7, 0.3]), torch.tensor([41, 7], dtype=torch.int32)):
        found = function(values, ends, 5)  # before what it should be is anywhere in memory
        if not torch.equal(found, expand(values, ends, 5)):
            return False
    return True


def repack_tied_heads(model: nn.Module) -> None:
    """On a CPU an output head that is tied to the embedding computes with a packed copy of it, which a reload of the
    embedding leaves as it was. It is packed again each time: what a policy learns in one step is less than the
    rounding of its kernel, so that no probe of the output could tell the old copy from the new one.

    Raises:
        RuntimeError: a head computes with other weights than its own, though packed again.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        UnquantizedEmbeddingMethod,
        VocabParallelEmbedding,
    )

    heads = [m for m in model.modules() if isinstance(m, ParallelLMHead)]
    tied = {id(m.weight) for m in model.modules() if isinstance(m, VocabParallelEmbedding) and m not in heads}
    for head in heads:
        if id(head.weight) not in tied or not isinstance(head.quant_method, UnquantizedEmbeddingMethod):
            continue
        head.quant_method.process_weights_after_loading(head)
        if not _holds_its_weight(head):
            raise RuntimeError(
                "vLLM's output head, which is tied to the embedding, computes with other weights than those that "
                "were loaded: give the policy an output head of its own (tie_word_embeddings=False)."
            )


def _holds_its_weight(head: nn.Module) -> bool:
    given = torch.arange(head.weight.shape[1]).cos()[None].to(head.weight)
    found, own = head.quant_method.apply(head, given).float(), nn.functional.linear(given, head.weight).float()
    return bool((found[:, : own.shape[1]] - own).norm() <= CLOSE * own.norm())


def repair_experts(model: nn.Module) -> None:
    """On a CPU a layer of experts computes with packed copies of its weights. vLLM 0.31 packs them when it starts, and
    not when they are reloaded: it then takes the plain ones for packed, and the layer's output is noise
    (findings/vllm-cpu-reload-scrambles-experts.sh)."""
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if not hasattr(layer, "w13_weight") or layer.w13_weight.device.type != "cpu":
            continue
        if hasattr(method, "moe_kernel") and not hasattr(method, "packs_again"):
            method.packs_again = True
            method.process_weights_after_loading = _packing(method.process_weights_after_loading, method)


def _packing(process: Any, method: Any) -> Any:
    """vLLM's `process`, and behind it the packing that it leaves out; where it has packed, nothing more."""

    def processed(layer: nn.Module) -> None:
        before = layer.w13_weight.detach().clone(), layer.w2_weight.detach().clone()
        process(layer)
        experts = getattr(method.moe_kernel, "fused_experts", None)
        plain = all(map(torch.equal, before, (layer.w13_weight, layer.w2_weight)))
        if plain and hasattr(experts, "isa"):
            experts.process_weights_after_loading(layer)

    return processed
