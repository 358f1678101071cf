"""A policy with adapters as one set of weights: merged into copies, layer by layer, so that the policy stays as it is.

TRL merges into the policy and takes the adapter out again at every push. In bfloat16 that rounds twice, and the base
creeps away from where it was (findings/peft-merge-unmerge-creeps-in-bfloat16.sh).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor, nn

WRAPPERS = ("base_model.model.", ".base_layer")
"""What PEFT puts into the names of a model's parameters."""

Whole = Callable[[nn.Parameter], AbstractContextManager[Tensor]]
"""Makes a parameter that may lie in pieces whole."""


def _live(weight: nn.Parameter) -> AbstractContextManager[Tensor]:
    return nullcontext(weight.data)


def merged_weights(model: nn.Module, whole: Whole = _live) -> Iterator[tuple[str, Tensor]]:
    """Names, as the PEFT model has them without its adapters, and tensors with the active adapters merged: computed in
    float32 at least, cast to the dtype of the policy's own. Those without an adapter are the live ones.

    Raises:
        ValueError: a quantised layer, of which no merged tensor can be taken.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    place, merged = "", {}
    for name, weight in model.named_parameters():
        if model.prefix in name or "original_module" in name:
            continue
        owner = _outermost(name, layers)
        if owner is None:
            with whole(weight) as live:
                yield _plain_name(name), live
            continue
        if owner != place:
            place, merged = owner, _merged(owner, layers[owner], whole)
        yield _plain_name(name), merged[name.removeprefix(f"{owner}.")].to(weight.dtype)


def _outermost(name: str, layers: dict[str, nn.Module]) -> str | None:
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix in layers), None)


@torch.no_grad()
def _merged(name: str, layer: nn.Module, whole: Whole) -> dict[str, Tensor]:
    """The parameters of a copy of `layer` that has taken in its active adapters, by their names in it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for weight in layer.parameters():
        if not weight.is_floating_point():
            raise ValueError(
                f"{_plain_name(name)} is quantised ({weight.dtype}), so its adapter cannot be merged for vLLM: load "
                "the policy without quantisation, or use rollout_backend='embedded'."
            )
    with ExitStack() as gathered:
        wide = {weight: torch.promote_types(weight.dtype, torch.float32) for weight in layer.parameters()}
        copies = {
            id(weight): nn.Parameter(gathered.enter_context(whole(weight)).to(dtype, copy=True), requires_grad=False)
            for weight, dtype in wide.items()
        }
    own = copy.deepcopy(layer, copies)
    for part in own.modules():
        if isinstance(part, BaseTunerLayer):  # one may hold another
            part.merge()
    return {name: weight.data for name, weight in own.named_parameters()}


def _plain_name(name: str) -> str:
    outer, inner = WRAPPERS
    return name.removeprefix(outer).replace(inner, "")
