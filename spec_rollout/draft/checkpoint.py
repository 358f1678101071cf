"""Writing the draft head: an EAGLE-3 folder of safetensors and json that vLLM and SGLang read too."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from spec_rollout.draft.eagle import EagleHead, HeadConfig

ARCHITECTURE = "LlamaForCausalLMEagle3"
FEATURE_SCALE = "feature_scale"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
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


def _config(config: HeadConfig, draft_vocab_size: int, extra: dict) -> dict:
    fields = config.to_dict()
    aux = list(fields.pop("aux_layers"))
    del fields["rope_scaling"]
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
        **({} if config.rope_scaling is None else {"rope_scaling": config.rope_scaling}),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": aux, "use_aux_hidden_state": True},
        "spec_rollout": extra,
    }
