"""Whether the draft is the policy's own MTP head, by the option and by what its checkpoint holds."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from spec_rollout.config import SpecConfig
from spec_rollout.draft.mtp import MtpHead
from spec_rollout.draft.mtp_checkpoint import find_tensors


def checkpoints_own(model: nn.Module, config: SpecConfig) -> dict[str, Tensor]:
    """The tensors of the MTP head to guess with, named as on disk; empty for an EAGLE head.

    Raises:
        ValueError: `draft_head="mtp"`, and the policy's checkpoint has none or one that cannot be run.
    """
    elsewhere = config.rollout_backend == "vllm" or config.compile_passes == "true" or config.draft_model_path
    if config.draft_head == "eagle3" or (config.draft_head == "auto" and elsewhere):
        return {}
    folder = getattr(model.config, "_name_or_path", None)
    tensors = find_tensors(folder, model)
    if not tensors and config.draft_head == "mtp":
        raise ValueError(
            f"draft_head='mtp', but the policy's folder {folder or '(none)'} holds no tensors named mtp.*, nor "
            "an eh_proj in a layer behind its last: load the policy from a checkpoint that has them, or guess with "
            "draft_head='eagle3'."
        )
    if tensors:
        try:
            MtpHead.of(model, tensors, folder, check=True)
        except ValueError as error:
            if config.draft_head == "mtp":
                raise
            warnings.warn(f"{error} An EAGLE-3 head is made.", RuntimeWarning, stacklevel=4)
            return {}
    return tensors
