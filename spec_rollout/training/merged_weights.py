"""A policy with adapters as one set of weights: merged into copies, layer by layer, so that the policy stays as it is.

TRL merges into the policy and takes the adapter out again at every push. In bfloat16 that rounds twice, and the base
creeps away from where it was (findings/peft-merge-unmerge-creeps-in-bfloat16.sh).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

WRAPPERS = ("base_model.model.", ".base_layer")
"""What PEFT puts into the names of a model's parameters."""


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
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
            yield _plain_name(name), weight.data
            continue
        if owner != place:
            place, merged = owner, _merged(owner, layers[owner])
        yield _plain_name(name), merged[name.removeprefix(f"{owner}.")].to(weight.dtype)


def _outermost(name: str, layers: dict[str, nn.Module]) -> str | None:
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix in layers), None)


@torch.no_grad()
def _merged(name: str, layer: nn.Module) -> dict[str, Tensor]:
    """The parameters of a copy of `layer` that has taken in its active adapters, by their names in it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for weight in layer.parameters():
        if not weight.is_floating_point():
            raise ValueError(
                f"{_plain_name(name)} is quantised ({weight.dtype}), so its adapter cannot be merged for vLLM: load "
                "the policy without quantisation, or use rollout_backend='embedded'."
            )
    own = copy.deepcopy(layer)
    for weight in own.parameters():
        weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
    for part in own.modules():
        if isinstance(part, BaseTunerLayer):  # one may hold another
            part.merge()
    return {name: weight.data for name, weight in own.named_parameters()}


def _plain_name(name: str) -> str:
    outer, inner = WRAPPERS
    return name.removeprefix(outer).replace(inner, "")
