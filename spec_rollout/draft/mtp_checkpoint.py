"""MTP heads on disk: beside the weights of a policy, or in a folder of their own."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from spec_rollout.draft.checkpoint import replace_folder
from spec_rollout.draft.checkpoint_reader import read_config
from spec_rollout.draft.mtp import MtpHead
from spec_rollout.draft.mtp_names import names_in, of_further, of_heads

ARCHITECTURE = "SpecRolloutMTP"
FILE = "mtp.safetensors"


def save_mtp(folder: str | Path, head: MtpHead, extra: dict, optimizer: dict[str, Tensor] | None = None) -> None:
    """Write `head` with json-able `extra` to `folder`, as `save_head` does an EAGLE head."""
    config = {"architectures": [ARCHITECTURE], "hidden_size": head.config.hidden_size, "spec_rollout": extra}
    replace_folder(folder, head.on_disk(torch.float32), config, optimizer)


def is_mtp(folder: str | Path) -> bool:
    """Whether `save_mtp` wrote the draft in `folder`."""
    return read_config(folder).get("architectures") == [ARCHITECTURE]


def load_mtp(folder: str | Path, model: nn.Module) -> tuple[MtpHead, dict]:
    """The head that `save_mtp` wrote for the policy `model`, and its `extra`.

    Raises:
        ValueError: it is unreadable, or made for another policy.
    """
    try:
        head = MtpHead.of(model, find_tensors(str(folder), model), folder)
    except ValueError as error:
        raise ValueError(f"{error} Give a head that was saved with this policy.") from error
    return head, read_config(folder)["spec_rollout"]


def find_tensors(policy: str | None, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of all MTP layers for `model`, named as on disk, of the policy's folder or of its copy in the Hub's
    cache; empty if none. Copies of the embedding and of the output head are left out.

    Raises:
        ValueError: a file of weights there is damaged.
    """
    folder = Path(policy or "")
    if policy and not folder.is_dir():
        config = cached_file(policy, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
        folder = Path(config).parent if config else folder
    if not policy or not folder.is_dir():
        return {}
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    with ExitStack() as files:
        opened = [files.enter_context(_opened(path)) for path in sorted(folder.glob("*.safetensors"))]
        places = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        names = names_in(places, layers)
        if names is None:
            return {}
        return {name: file.get_tensor(name) for name, file in places.items() if of_heads(name, names, layers)}


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is no whole file of weights ({error}): copy it again, or take it away if nothing needs it."
        ) from error


def with_further(head: MtpHead, read: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What `head.on_disk` gives, and those of further MTP layers among the tensors `read` with it, which nothing here
    runs, as they were."""
    return head.on_disk(dtype) | {name: tensor for name, tensor in read.items() if of_further(name, head.names)}


def add_to_policy(folder: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` beside the weights of the policy saved in `folder`, and into their index if there is one."""
    folder = Path(folder)
    save_file(tensors, folder / FILE)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():
        listed = json.loads(index.read_text())
        listed["weight_map"] |= dict.fromkeys(tensors, FILE)
        index.write_text(json.dumps(listed, indent=2) + "\n")
