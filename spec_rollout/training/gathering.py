"""A policy that lies in pieces, made whole: all of it on every rank while the embedded engine samples, so that no rank
waits for another inside the decode loop; weight by weight, or the few that the draft reads, beside vLLM."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from trl.models import unwrap_model_for_generation
from trl.models.utils import add_hooks, remove_hooks

from spec_rollout.draft.inheritance import read_by_head
from spec_rollout.engine.virtual_tokens import virtual_tokens

if TYPE_CHECKING:
    from transformers import Trainer


def refuse_unfit_for_vllm(trainer: Trainer) -> None:
    """Refuse a policy that vLLM cannot hold.

    Raises:
        ValueError: naming the setting and the remedy.
    """
    served_by_vllm = getattr(trainer.args, "rollout_backend", "embedded") == "vllm"
    if served_by_vllm and virtual_tokens(trainer.accelerator.unwrap_model(trainer.model)):
        raise ValueError(
            "rollout_backend='vllm' takes the weights of a policy, but virtual tokens (PEFT's prompt and prefix "
            "tuning) are none: use rollout_backend='embedded', or an adapter that can be merged, such as LoRA."
        )


def refuse_partitioned(trainer: Trainer) -> None:
    """Refuse a setting that leaves the policy in pieces: every token would need all ranks, but ranks finish unevenly.

    Raises:
        ValueError: naming the setting and the remedy.
    """
    served_by_vllm = getattr(trainer.args, "rollout_backend", "embedded") == "vllm"
    if trainer._dist.is_zero3 and not trainer.args.ds3_gather_for_generation and not served_by_vllm:
        raise ValueError(
            "ds3_gather_for_generation=False leaves the ZeRO-3 policy partitioned, but each rank samples on its own: "
            "set ds3_gather_for_generation=True, or use ZeRO-2 or TRL's own trainer if the policy does not fit."
        )
    in_pieces = trainer._dist.is_zero3 or trainer._dist.is_fsdp
    if served_by_vllm and in_pieces and trainer.args.vllm_enable_sleep_mode:
        raise ValueError(
            "vllm_enable_sleep_mode=True was not tested with a policy in pieces, as ZeRO-3 and FSDP leave it: set it "
            "to False, or vllm_mode to 'server' and start `spec-rollout serve`, or use DDP or ZeRO-2."
        )
    left_whole = trainer.accelerator.distributed_type == DistributedType.MULTI_CPU
    if left_whole and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "FSDP was asked for, but Accelerate shards on accelerators only: without one each process would hold the "
            "whole policy. Use DDP (recipes/accelerate/ddp.yaml), or ZeRO, which shards on a CPU too."
        )
    if trainer._dist.fsdp_version == 1:
        raise ValueError(
            "fsdp_version=1 shards the policy while it decodes, but each rank samples on its own: set fsdp_version: 2 "
            "(accelerate's to-fsdp2 command converts a configuration)."
        )


@contextmanager
def gathered_policy(trainer: Trainer) -> Iterator[nn.Module]:
    """The unwrapped policy with all its weights; every rank enters and leaves it together.

    ZeRO-3 is gathered, and gradient checkpointing suspended, by TRL; FSDP2 is unsharded here, where TRL would gather
    in each forward pass.
    """
    with (
        unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as policy,
        _unsharded(policy, trainer),
    ):
        yield policy


@contextmanager
def _unsharded(policy: nn.Module, trainer: Trainer) -> Iterator[None]:
    if trainer._dist.fsdp_version != 2:
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    shards = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        reshard = trainer.accelerator.state.fsdp_plugin.reshard_after_forward
        for module in shards:
            module.set_reshard_after_forward(reshard and module is not policy, recurse=False)
            module.reshard()


@contextmanager
def whole_for_draft(trainer: Trainer) -> Iterator[None]:
    """The parts of the policy that a draft head reads have all their weights; every rank enters and leaves it
    together. No forward pass of the policy may run within."""
    policy = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    parts = read_by_head(policy) if trainer._dist.is_zero3 or trainer._dist.fsdp_version == 2 else []
    if trainer._dist.is_zero3:
        import deepspeed

        weights = {id(weight): weight for part in parts for weight in part.parameters()}
        remove_hooks(trainer.model_wrapped)  # a norm that is tried out would give its weight away again
        try:
            with deepspeed.zero.GatheredParameters(list(weights.values())):
                yield
        finally:
            add_hooks(trainer.model_wrapped)
        return
    shards = _shards_of(policy, parts) if parts else []
    for module in shards:
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()


def _shards_of(policy: nn.Module, parts: list[nn.Module]) -> list[nn.Module]:
    """The modules by which FSDP2 shards the `parts` of `policy`: each the innermost one around it."""
    from torch.distributed.fsdp import FSDPModule

    names = {id(module): name for name, module in policy.named_modules()}
    shards = {name: module for name, module in policy.named_modules() if isinstance(module, FSDPModule)}
    found = {}
    for part in parts:
        around = [name for name in shards if f"{names[id(part)]}.".startswith(f"{name}." if name else "")]
        found |= {name: shards[name] for name in [max(around, key=len)]}
    return list(found.values())


@contextmanager
def whole_weight(weight: nn.Parameter) -> Iterator[Tensor]:
    """A parameter of a policy that may lie in pieces, whole on this rank; every rank enters it together."""
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            yield weight.data
        return
    yield weight.detach().full_tensor() if isinstance(weight, DTensor) else weight.data


@contextmanager
def own_random_stream(trainer: Trainer) -> Iterator[None]:
    """Restores torch's random state, so that drafting, of whatever kind, cannot reach what is learned."""
    device = trainer.accelerator.device
    devices = [] if device.type in ("cpu", "mps") else [device.index or 0]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        yield
