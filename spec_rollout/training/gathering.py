"""The whole policy on every rank while it samples, so that no rank waits for another inside the decode loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from trl.models import unwrap_model_for_generation

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
    if trainer._dist.is_zero3 and not trainer.args.ds3_gather_for_generation:
        raise ValueError(
            "ds3_gather_for_generation=False leaves the ZeRO-3 policy partitioned, but each rank samples on its own: "
            "set ds3_gather_for_generation=True, or use ZeRO-2 or TRL's own trainer if the policy does not fit."
        )
    partitioned = trainer._dist.is_zero3 or trainer._dist.is_fsdp
    if getattr(trainer.args, "rollout_backend", "embedded") == "vllm" and partitioned:
        raise ValueError(
            "rollout_backend='vllm' takes a policy that is whole on each rank, but ZeRO-3 and FSDP partition it: use "
            "DDP or ZeRO-2, or rollout_backend='embedded'."
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
def own_random_stream(trainer: Trainer) -> Iterator[None]:
    """Restores torch's random state, so that drafting, of whatever kind, cannot reach what is learned."""
    device = trainer.accelerator.device
    devices = [] if device.type in ("cpu", "mps") else [device.index or 0]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        yield
