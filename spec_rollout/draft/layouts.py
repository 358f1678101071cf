"""The layouts in which others publish EAGLE-3 heads, brought to the one that is read here.

A head is known by its tensors: configs name it `LlamaForCausalLM`, `Eagle3LlamaForCausalLM` and more, or count the
layers of the target.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from spec_rollout.draft.eagle import ROPES

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
LAYER = "midlayer."
OTHER_LAYER = "layers.0."
OF_THE_TARGET = ("t2d", "embed_tokens.weight")
"""Not taken: the live policy's embedding is, and `t2d` says what `d2t` does."""
MARKS = ("fc.weight", f"{LAYER}hidden_norm.weight", f"{LAYER}self_attn.q_proj.weight", "norm.weight")
"""Tensors that every EAGLE-3 head has; one of the first EAGLE lacks two of them."""


def weights_file(folder: Path) -> tuple[str, Callable[[Path], dict[str, Tensor]]]:
    """Name and reader of the weights in `folder`: safetensors before torch's own format, which is read without
    executing anything in it."""
    if not (folder / SAFE).exists() and (folder / PICKLED).exists():
        return PICKLED, read_pickled
    return SAFE, load_file


def read_pickled(path: Path) -> dict[str, Tensor]:
    """
    Raises:
        ValueError: the file holds more than tensors, or something else than a file of torch.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch gives what it trips over no common class
        raise ValueError(f"torch.load(weights_only=True) refuses it: {type(error).__name__}: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError("it holds something else than a dictionary of tensors")
    return tensors


def own_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The head's tensors under the names of `EagleHead`, `d2t` besides; what belongs to the target is left out.

    Raises:
        ValueError: they are not those of an EAGLE-3 head with one layer.
    """
    named = {name.removeprefix("model.").replace(OTHER_LAYER, LAYER): tensor for name, tensor in tensors.items()}
    found = {
        name: tensor
        for name, tensor in named.items()
        if name not in OF_THE_TARGET and not name.startswith("verifier_") and not name.endswith("rotary_emb.inv_freq")
    }
    missing = [name for name in MARKS if name not in found]
    if missing:
        raise ValueError(f"no EAGLE-3 head: {', '.join(missing)} is missing among its {len(tensors)} tensors")
    hidden, width = found["norm.weight"].shape[0], found[f"{LAYER}self_attn.q_proj.weight"].shape[-1]
    if width != 2 * hidden:
        raise ValueError(f"no EAGLE-3 head: its attention reads {width} channels, not twice its {hidden}")
    if any(name.startswith("layers.1.") for name in found):
        raise ValueError("a head of several layers, where only one is served")
    if "d2t" not in found and "t2d" in named and "lm_head.weight" in found:
        ids = named["t2d"].bool().nonzero()[:, 0]
        if len(ids) == len(found["lm_head.weight"]):
            found["d2t"] = ids - torch.arange(len(ids))
    return found


def rope(config: dict[str, Any]) -> tuple[float | None, dict[str, Any] | None]:
    """Base and scaling (None for plain rope) of the rotary embedding that a head's `config` describes.

    Raises:
        ValueError: a kind that is not served, or one that lacks a number.
    """
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = given.pop("type", "default")
    kind = given.pop("rope_type", kind)
    theta = config.get("rope_theta") or given.pop("rope_theta", None)
    given.pop("rope_theta", None)
    if kind not in ROPES:
        raise ValueError(f"rope_type={kind} is not supported, only {', '.join(ROPES)}")
    missing = [name for name in ROPES[kind] if given.get(name) is None]
    if missing:
        raise ValueError(f"rope_type={kind} needs {', '.join(missing)}")
    return theta, None if kind == "default" else {"rope_type": kind, **given}
