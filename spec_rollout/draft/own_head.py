"""Whether the draft is the policy's own MTP head, by the option and by what its checkpoint holds."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import Tensor, nn
from transformers import PretrainedConfig

from spec_rollout.config import SpecConfig
from spec_rollout.draft.mtp import MtpHead
from spec_rollout.draft.mtp_checkpoint import find_tensors, is_mtp
from spec_rollout.engine.support import has_recurrent_layers

IN_VLLM = ("glm4_moe", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
"""Model types whose MTP heads vLLM was seen to take while it runs, and to guess with as it should."""


def checkpoints_own(model: nn.Module, config: SpecConfig) -> dict[str, Tensor]:
    """The tensors of the MTP head to guess with, named as on disk; empty for an EAGLE head.

    Raises:
        ValueError: `draft_head="mtp"`, and the policy's checkpoint has none or one that cannot be run; or it has one
            that cannot, and an EAGLE head cannot stand in for it.
    """
    elsewhere = config.compile_passes == "true" or config.draft_model_path
    if config.draft_head == "eagle3" or (config.draft_head == "auto" and elsewhere):
        return {}
    folder = getattr(model.config, "_name_or_path", None)
    tensors = find_tensors(folder, model)
    fault = _fault(model, tensors, folder, config)
    if fault is None:
        return tensors
    in_vllm = config.rollout_backend == "vllm"
    alone = in_vllm and has_recurrent_layers(model, model.config.get_text_config(decoder=True))
    if config.draft_head == "mtp" or (alone and tensors):
        instead = "num_speculative_tokens=0" if alone else "draft_head='eagle3'"
        instead += ", or rollout_backend='embedded'" * in_vllm
        instead += f" (for the recurrent layers of {type(model).__name__} vLLM takes no EAGLE-3 head)" * alone
        raise ValueError(f"{fault} Or set {instead}.")
    if tensors:
        warnings.warn(f"{fault} An EAGLE-3 head is made.", RuntimeWarning, stacklevel=4)
    return {}


def _fault(model: nn.Module, tensors: dict[str, Tensor], folder: str | None, config: SpecConfig) -> str | None:
    """Why `model` does not guess with `tensors`, the MTP layers in `folder`; None if it does."""
    if not tensors:
        return (
            f"draft_head='mtp', but the policy's folder {folder or '(none)'} holds no tensors named mtp.*, nor "
            "an eh_proj in a layer behind its last: load the policy from a checkpoint that has them."
        )
    unfit = refused_by_vllm(model, folder) if config.rollout_backend == "vllm" else None
    if unfit:
        return f"The policy's MTP head does not go with rollout_backend='vllm': {unfit}."
    try:
        MtpHead.of(model, tensors, folder, check=True)
    except ValueError as error:
        return str(error)
    return None


def refused_by_vllm(model: nn.Module, folder: str | None) -> str | None:
    """Why vLLM cannot be given the MTP head of `model`, which came from `folder`; None if it can."""
    kind = model.config.get_text_config(decoder=True).model_type
    if kind not in IN_VLLM:
        return f"vLLM was not seen to guess rightly with the MTP head of {kind!r}, only of {', '.join(IN_VLLM)}"
    saved = PretrainedConfig.get_config_dict(folder)[0].get("model_type", kind) if folder else kind
    if saved != kind:
        return f"{folder} holds a {saved!r}, which vLLM runs otherwise than the {kind!r} that is trained"
    return None


def refuse_other_kind(folder: str | Path, own: bool, config: SpecConfig) -> None:
    """
    Args:
        folder: of the head that shall be taken up.
        own: whether the policy's own MTP head guesses.

    Raises:
        ValueError: vLLM is started with a head of the other kind.
    """
    if config.rollout_backend == "vllm" and is_mtp(folder) != own:
        raise ValueError(
            f"{folder} holds no MTP head, but vLLM is started with the policy's own: give one that was saved with it, "
            "or, for a policy without recurrent layers, set draft_head='eagle3'."
            if own
            else f"{folder} holds an MTP head, but vLLM is not started with the policy's own: set draft_head='mtp', "
            "give an EAGLE-3 head, or set rollout_backend='embedded'."
        )
