"""The draft head on disk: an EAGLE-3 folder of safetensors and json that vLLM and SGLang read too.

Read are that format, whoever wrote it, and the one of the speculators library.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.formats import ARCHITECTURE, CONFIG, eagle_config

FEATURE_SCALE = "feature_scale"
WEIGHTS = "model.safetensors"
OPTIMIZER = Path("training", "optimizer.safetensors")
"""In a folder of its own, since vLLM takes every safetensors file beside the weights for weights."""


def save_head(
    folder: str | Path,
    head: EagleHead,
    output_rows: Tensor | None,
    draft_ids: Tensor | None,
    extra: dict,
    optimizer: dict[str, Tensor] | None = None,
) -> None:
    """Write `head` to `folder`, replacing it as a whole (`replace_folder`).

    Args:
        output_rows: [Vd, H], the policy's output head for the draft vocabulary, for engines that want it in the file;
            None leaves it out, and vLLM shares the policy's.
        draft_ids: [Vd] target ids, stored as the offset `d2t` that vLLM reads; None for the whole vocabulary, of which
            vLLM takes no `d2t`.
        extra: json-able state to keep beside the weights, under `spec_rollout` in the config.
        optimizer: tensors that training goes on from, in a file of their own.
    """
    size = head.config.vocab_size if draft_ids is None else len(draft_ids)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.folded().items()}
    extra = {**extra, FEATURE_SCALE: head.feature_scale.tolist()[:: head.config.hidden_size]}
    if head.own_output is None and output_rows is not None:
        tensors["lm_head.weight"] = output_rows.detach().to(tensors["fc.weight"].dtype).cpu().clone()
        extra["lm_head"] = "policy"
    if draft_ids is not None:
        tensors["d2t"] = draft_ids.cpu() - torch.arange(size)
    replace_folder(folder, tensors, _config(head.config, size, extra), optimizer)


def replace_folder(
    folder: str | Path, tensors: dict[str, Tensor], config: dict, optimizer: dict[str, Tensor] | None = None
) -> None:
    """Write a draft's `tensors`, `config` and `optimizer` to `folder`, replacing it as a whole.

    A crash leaves the old folder or the new one; between the two renames that exchange them, the old one beside it as
    `.NAME-old-*/NAME`.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file(tensors, staging / WEIGHTS)
        if optimizer:
            (staging / OPTIMIZER).parent.mkdir()
            save_file({name: t.detach().cpu().contiguous() for name, t in optimizer.items()}, staging / OPTIMIZER)
        (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        staging.chmod(0o755)
        if folder.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            folder.rename(retired / folder.name)
            staging.rename(folder)
            shutil.rmtree(retired)
        else:
            staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_head(folder: str | Path, wanted: HeadConfig) -> tuple[EagleHead, Tensor | None, dict]:
    """Read a head made for a target of `wanted`'s hidden size and vocabulary.

    Returns the head (float32), the target ids of its vocabulary (None: all of it) and the `extra` of `save_head`.

    Raises:
        ValueError: no draft head there, or one for another target; the message names both values and the remedy.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = _read(folder, WEIGHTS, load_file)
    found = eagle_config(folder, config, wanted)
    extra = dict(config.get("spec_rollout", {}))
    offsets = tensors.pop("d2t", None)
    for name in ("t2d", "embed_tokens.weight"):  # the live policy's embedding is used instead
        tensors.pop(name, None)
    given = {
        name.replace("layers.0.", "midlayer."): tensor
        for name, tensor in tensors.items()
        if not name.startswith("verifier_")  # speculators' copies of the policy's
    }
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
            f"{folder / WEIGHTS} does not hold the EAGLE-3 head that its {CONFIG} describes: "
            f"{', '.join(sorted(wrong)[:4])} is missing, foreign or of another shape. "
            "Export the head again, or start without draft_model_path."
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


def _read(folder: Path, name: str, reader: Callable[[Path], dict]) -> dict:
    try:
        return reader(folder / name)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{folder} is not a readable draft head ({name}: {type(error).__name__}: {error}): it needs an EAGLE-3 "
            f"{CONFIG} and {WEIGHTS}. Give another draft_model_path, or none to start cold."
        ) from error


def _config(config: HeadConfig, draft_vocab_size: int, extra: dict) -> dict:
    fields = config.to_dict()
    aux = list(fields.pop("aux_layers"))
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        **fields,
        "num_hidden_layers": 1,
        "draft_vocab_size": draft_vocab_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": aux, "use_aux_hidden_state": True},
        "spec_rollout": extra,
    }
