"""What the host hands to the device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Slots(NamedTuple):
    """Numbers of slots, [N] int64 each, as both sides know them."""

    host: np.ndarray
    device: Tensor


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """`values` on `device`; on a CPU the same memory.

    From pinned memory, which may be used again once the copy is done: a plain `to` waits until the device has finished
    all that it was given.
    """
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def on_both_sides(slots: Sequence[int] | np.ndarray, device: torch.device) -> Slots:
    """The numbers of `slots`, told to the device."""
    host = np.asarray(slots, dtype=np.int64)
    return Slots(host, upload(host, device))


def download(tensor: Tensor) -> Tensor:
    """A copy of `tensor` in host memory, which is there once the device has done what it was given until now; on a CPU
    the same memory."""
    if tensor.device.type == "cpu":
        return tensor
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return kept.copy_(tensor, non_blocking=True)
