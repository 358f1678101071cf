"""Reading a draft head: an EAGLE-3 folder, whoever wrote it, or one of the speculators library."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spec_rollout.draft.checkpoint import ARCHITECTURE, CONFIG, FEATURE_SCALE, OPTIMIZER, WEIGHTS
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.layouts import PICKLED, own_names, rope, weights_file

SPECULATORS = "speculators_model_type"


def load_head(folder: str | Path, wanted: HeadConfig, finite: bool = True) -> tuple[EagleHead, Tensor | None, dict]:
    """Read a head made for a target of `wanted`'s hidden size and vocabulary, of `finite` numbers unless told not to.

    Returns the head (float32), the target ids of its vocabulary (None: all of it) and the `extra` of `save_head`.

    Raises:
        ValueError: no draft head there, one for another target, or of NaN; the message names both values and the
            remedy.
    """
    folder = Path(folder)
    config = read_config(folder)
    weights, reader = weights_file(folder)
    tensors = _read(folder, weights, reader)
    given = _read(folder, weights, lambda path: own_names(tensors))
    found = _head_config(folder, config, wanted)
    extra = dict(config.get("spec_rollout", {}))
    offsets = given.pop("d2t", None)
    if extra.pop("lm_head", None) == "policy":
        given.pop("lm_head.weight", None)
    output = given.get("lm_head.weight")
    head = EagleHead(found, own_output=None if output is None else len(output))
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    wrong = [
        name
        for name in expected.keys() | given.keys()
        if name not in given or expected.get(name) != tuple(given[name].shape)
    ]
    if wrong:
        raise ValueError(
            f"{folder / weights} does not hold the EAGLE-3 head that its {CONFIG} describes: "
            f"{', '.join(sorted(wrong)[:4])} is missing, foreign or of another shape. "
            "Export the head again, or start without draft_model_path."
        )
    broken = sorted(name for name, tensor in given.items() if not tensor.isfinite().all())
    if finite and broken:
        raise ValueError(
            f"The draft head in {folder} holds NaN or infinite numbers ({', '.join(broken[:4])}): copy it again, give "
            "another draft_model_path, or none to start cold."
        )
    head.load_state_dict({name: tensor.float() for name, tensor in given.items()})
    _unfold(head, extra.pop(FEATURE_SCALE, None), folder)
    return head, _draft_ids(folder, offsets, output, wanted.vocab_size), extra


def read_config(folder: str | Path) -> dict:
    """The config.json of a draft's folder.

    Raises:
        ValueError: the file cannot be read.
    """
    return _read(Path(folder), CONFIG, lambda path: json.loads(path.read_text()))


def load_optimizer(folder: str | Path) -> dict[str, Tensor]:
    """What `save_head` was given as `optimizer`; empty where nothing was saved.

    Raises:
        ValueError: the file cannot be read.
    """
    folder = Path(folder)
    return _read(folder, OPTIMIZER, load_file) if (folder / OPTIMIZER).exists() else {}


def _draft_ids(folder: Path, offsets: Tensor | None, output: Tensor | None, vocab_size: int) -> Tensor | None:
    """Target ids of the draft vocabulary from the offsets `d2t`; None for the whole vocabulary."""
    size = vocab_size if output is None else len(output)
    ids = torch.arange(size) if offsets is None else offsets + torch.arange(len(offsets))
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise ValueError(
            f"{folder}: d2t points to token {int(ids.max())}, outside the policy's vocabulary of {vocab_size}: "
            "the head was made for another tokenizer. Start without draft_model_path."
        )
    if output is not None and len(ids) != size:
        raise ValueError(
            f"{folder}: lm_head has {size} rows, d2t {len(ids)}: they must be equally many. Export the head again, or "
            "start without draft_model_path."
        )
    return None if torch.equal(ids, torch.arange(vocab_size)) else ids


def _unfold(head: EagleHead, scales: list[float] | None, folder: Path) -> None:
    """Take the features' scales, one per fused layer, out of `fc` again; heads from elsewhere have none."""
    if scales is None:
        return
    number = len(head.config.aux_layers)
    valid = isinstance(scales, list) and len(scales) == number and all(isinstance(s, float) for s in scales)
    if not valid or not all(0 < s < math.inf for s in scales):
        raise ValueError(
            f"{folder / CONFIG}: {FEATURE_SCALE}={scales} must be {number} positive numbers. "
            "Export the head again, or start without draft_model_path."
        )
    head.feature_scale.copy_(torch.tensor(scales).repeat_interleave(head.config.hidden_size))
    with torch.no_grad():
        head.fc.weight /= head.feature_scale


def _read(folder: Path, name: str | Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(folder / name)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{folder} is not a readable draft head ({name}: {type(error).__name__}: {error}): it needs an EAGLE-3 "
            f"{CONFIG} and {WEIGHTS} or {PICKLED}. Give another draft_model_path, or none to start cold."
        ) from error


def _head_config(folder: Path, config: dict, wanted: HeadConfig) -> HeadConfig:
    if SPECULATORS in config:
        config = _from_speculators(folder, config)
    for name in ("hidden_size", "vocab_size"):
        if config.get(name) != getattr(wanted, name):
            raise ValueError(
                f"The draft head in {folder} was made for a policy with {name}={config.get(name)}, this policy has "
                f"{getattr(wanted, name)}. Give the draft of this policy, or none to start cold."
            )
    theta, scaling = _read(folder, CONFIG, lambda path: rope(config))
    for name, value, served in (
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("norm_output", config.get("norm_output", False), False),
    ):
        if value != served:
            raise ValueError(
                f"{folder / CONFIG}: {name}={value} is not supported, only {served}. Give another draft_model_path, "
                "or none to start cold."
            )
    fields = {name: config[name] for name in wanted.to_dict() if config.get(name) is not None}
    if "head_dim" not in fields and "num_attention_heads" in fields:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    fields["rope_theta"], fields["rope_scaling"] = float(theta or wanted.rope_theta), scaling
    layers = wanted.aux_layers[-1] + 1
    named = "eagle_aux_hidden_state_layer_ids"
    aux = (config.get("eagle_config") or {}).get(named) or config.get(named)
    fields["aux_layers"] = tuple(
        aux or (2, layers // 2, layers - 3)
    )  # the EAGLE-3 authors' layers, where none are named
    if not all(0 <= layer < layers for layer in fields["aux_layers"]):
        raise ValueError(
            f"The draft head in {folder} reads the layers {fields['aux_layers']}, this policy has {layers}. Give the "
            "draft of this policy, or none to start cold."
        )
    return HeadConfig(**{**wanted.to_dict(), **fields})


def _from_speculators(folder: Path, config: dict) -> dict:
    """The speculators library's config as an EAGLE-3 one; its layer adds to the normed input unless told otherwise."""
    if config[SPECULATORS] != "eagle3":
        raise ValueError(
            f"{folder} holds a {config[SPECULATORS]!r} speculator, not 'eagle3'. Give another draft_model_path, or "
            "none to start cold."
        )
    return {
        **config["transformer_layer_config"],
        "architectures": [ARCHITECTURE],
        "num_hidden_layers": 1,
        "norm_before_residual": config.get("norm_before_residual", True),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": config.get("eagle_aux_hidden_state_layer_ids")},
    }
