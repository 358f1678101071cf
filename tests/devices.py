"""Tests elsewhere than on the CPU: what a test makes lies where its policies do; the product must see to its own."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

FACTORIES = "tensor as_tensor zeros ones empty full arange rand randn randint randperm eye linspace from_numpy"


def follow(device: torch.device) -> None:
    """From here on, tensors that a module of the tests makes without naming a device lie on `device`. They are made on
    the CPU and moved, so that random numbers are the same everywhere."""
    for name in FACTORIES.split():
        setattr(torch, name, _moved(getattr(torch, name), device))


def _moved(make: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    def made(*args, **kwargs) -> Tensor:
        tensor = make(*args, **kwargs)
        by_test = sys._getframe(1).f_globals.get("__name__", "").startswith("tests.")
        return tensor.to(device) if by_test and kwargs.get("device") is None else tensor

    return made
