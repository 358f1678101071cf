"""Checkpoints of policies whose weights have other names, or another shape, on disk than in the model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, Trainer


class WholeWeights:
    """Stands before a transformers `Trainer` in the bases of a class, and takes up all weights of a checkpoint.

    A model saves its stacked experts one by one. `Trainer` reads a checkpoint by the names in it, and leaves the
    stacked ones as they were, with a warning (findings/transformers-resume-leaves-experts.sh).
    """

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        _load_renamed(self, self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        _load_renamed(self, self.model, self.state.best_model_checkpoint)


def _load_renamed(trainer: Trainer, model: nn.Module, folder: str) -> None:
    """Give `model` the weights in `folder` whose names there are not its own; DeepSpeed and FSDP have their own files
    beside, and PEFT's adapters keep their names."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or not isinstance(model, PreTrainedModel):
        return
    names: set[str] = set()
    for file in Path(folder).glob("model*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    own = model.state_dict()
    if names <= own.keys():
        return
    read = type(model).from_pretrained(folder, dtype=model.dtype).state_dict()
    with torch.no_grad():
        for name in own.keys() & read.keys() - names:
            own[name].copy_(read[name])
