"""The draft head on disk: an EAGLE-3 folder of safetensors and json that vLLM and SGLang read too."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spec_rollout.draft.eagle import EagleHead, HeadConfig

ARCHITECTURE = "LlamaForCausalLMEagle3"
FEATURE_SCALE = "feature_scale"
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save_head(folder: str | Path, head: EagleHead, output_rows: Tensor, draft_ids: Tensor | None, extra: dict) -> None:
    """Write `head` to `folder`, replacing it as a whole: a crash leaves the old folder or the new one.

    Args:
        output_rows: [Vd, H], the policy's output head for the draft vocabulary; serving engines want it in the file.
        draft_ids: [Vd] target ids, or None for the whole vocabulary; stored as the offset `d2t` that vLLM reads.
        extra: json-able state to keep beside the weights, under `spec_rollout` in the config.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    size = len(output_rows)
    ids = torch.arange(size) if draft_ids is None else draft_ids.cpu()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.folded().items()}
    extra = {**extra, FEATURE_SCALE: head.feature_scale.tolist()[:: head.config.hidden_size]}
    tensors["lm_head.weight"] = output_rows.detach().to(tensors["fc.weight"].dtype).cpu().clone()
    tensors["d2t"] = ids - torch.arange(size)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file(tensors, staging / WEIGHTS)
        (staging / CONFIG).write_text(json.dumps(_config(head.config, size, extra), indent=2) + "\n")
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
    config, tensors = _read(folder)
    found = _head_config(folder, config, wanted)
    head = EagleHead(found)
    offsets = tensors.pop("d2t", None)
    for name in ("lm_head.weight", "t2d", "embed_tokens.weight"):  # the live policy's are used instead
        tensors.pop(name, None)
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    given = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}
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
    extra = config.get("spec_rollout", {})
    _unfold(head, extra.pop(FEATURE_SCALE, None), folder)
    ids = None if offsets is None else offsets + torch.arange(len(offsets))
    if ids is not None and (int(ids.min()) < 0 or int(ids.max()) >= wanted.vocab_size):
        raise ValueError(
            f"{folder}: d2t points to token {int(ids.max())}, outside the policy's vocabulary of {wanted.vocab_size}: "
            "the head was made for another tokenizer. Start without draft_model_path."
        )
    if ids is not None and torch.equal(ids, torch.arange(wanted.vocab_size)):
        ids = None
    return head, ids, extra


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


def _read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        config = json.loads((folder / CONFIG).read_text())
        return config, load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{folder} is not a readable draft head ({type(error).__name__}: {error}): it needs an EAGLE-3 {CONFIG} "
            f"and {WEIGHTS}. Give another draft_model_path, or none to start cold."
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


def _head_config(folder: Path, config: dict, wanted: HeadConfig) -> HeadConfig:
    if config.get("architectures") != [ARCHITECTURE]:
        raise ValueError(
            f"{folder} holds {config.get('architectures')}, not an EAGLE-3 head ({ARCHITECTURE}). Give another "
            "draft_model_path, or none to start cold."
        )
    for name in ("hidden_size", "vocab_size"):
        if config.get(name) != getattr(wanted, name):
            raise ValueError(
                f"The draft head in {folder} was made for a policy with {name}={config.get(name)}, this policy has "
                f"{getattr(wanted, name)}. Give the draft of this policy, or none to start cold."
            )
    fields = {name: config[name] for name in wanted.to_dict() if name in config}
    rope = config.get("rope_parameters") or {}
    fields["rope_theta"] = float(config.get("rope_theta") or rope.get("rope_theta") or wanted.rope_theta)
    fields["aux_layers"] = tuple(
        config.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids", wanted.aux_layers)
    )
    return HeadConfig(**{**wanted.to_dict(), **fields})
