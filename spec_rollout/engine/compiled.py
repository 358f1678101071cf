"""Functions of the decode loop through torch's compiler, for sizes that change from step to step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._dynamo.exc import TorchDynamoException
from torch.fx.experimental import _config as shapes

VARIANTS = 64
"""Most times that one function is compiled: once for each set of its sizes that are 1, and again where a size or a
layout comes to equal another by chance."""


class NotCompilableError(ValueError):
    """torch's compiler fails on the policy or the draft."""

    @classmethod
    def of(cls, name: str, reason: str) -> NotCompilableError:
        """`name` is what cannot be compiled."""
        return cls(
            f"compile_passes: torch cannot compile {name} ({reason}). Decode without it, or install what is "
            "missing; on a CPU torch needs a C++ compiler."
        )


class Compiled:
    """Compiles `function`, a part of `name`, at its first call and keeps what was compiled for every size of its
    tensors but 1, which torch takes apart.

    Raises:
        NotCompilableError: at that call, if torch or the C++ compiler that it runs cannot.
    """

    def __init__(self, function: Callable, name: str):
        self.name = name
        self._function = torch.compile(function, dynamic=True)

    def __call__(self, *args):
        # Sizes that are equal at one call, such as rows and tokens of a row, are not taken to be one size.
        try:
            with shapes.patch(use_duck_shape=False), torch._dynamo.config.patch(recompile_limit=VARIANTS):
                return self._function(*args)
        except TorchDynamoException as error:
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise NotCompilableError.of(self.name, reason) from error
