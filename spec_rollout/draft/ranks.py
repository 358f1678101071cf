"""The processes that train one head together: every rank holds the same head, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def count() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(tensor: Tensor) -> Tensor:
    """`tensor` summed over the ranks, in place. As with all that follows, every rank calls it as often as the others,
    and none while decoding."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def agree(wish: bool, device: torch.device) -> bool:
    """Whether every rank wishes it."""
    return wish if count() == 1 else total(torch.tensor(float(wish), device=device)).item() == count()


def average(gradients: Sequence[Tensor], loss: Tensor) -> Tensor:
    """Replace the `gradients` by their means over the ranks; returns the mean of the scalar `loss`."""
    if count() == 1:
        return loss
    flat = total(torch.cat([*(g.flatten() for g in gradients), loss.float()[None]])) / count()
    for gradient, mean in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
    return flat[-1]


def share(tensors: Iterable[Tensor]) -> None:
    """Every rank takes rank 0's `tensors`, in place."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def differ(module: nn.Module) -> bool:
    """Whether the weights of `module` are not the same on all ranks, bit for bit, judged by a checksum."""
    if count() == 1:
        return False
    tensors = list(module.state_dict().values())
    digest = hashlib.blake2b(digest_size=6)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    mine = int.from_bytes(digest.digest(), "big")
    extremes = torch.tensor([mine, -mine], dtype=torch.int64, device=tensors[0].device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return bool(extremes[0] != -extremes[1])
