"""What trains a reference policy: its optimizer and the bar over its steps."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, TrainerCallback

SCALE_RATE = 3e-3
"""Learning rate of embeddings and norms, which AdamW trains; the matrices learn by Muon."""


def make_bar() -> TrainerCallback:
    """A bar over the training, with the loss beside it."""
    from tqdm import tqdm
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.bar = tqdm(total=state.max_steps, desc="training the policy", unit="step", file=sys.stderr)

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in (logs or {}):
                self.bar.set_postfix(loss=f"{float(logs['loss']):.2f}")

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.close()

    return Bar()


def make_optimizer(model: PreTrainedModel, learning_rate: float) -> torch.optim.Optimizer:
    """Muon for the matrices of the layers, AdamW for the rest, behind one optimizer."""
    import torch

    from spec_rollout.draft.muon import Muon

    class Both(torch.optim.Optimizer):
        """Shares its parameter groups with its parts, so that a scheduler reaches them."""

        def __init__(self, *parts: torch.optim.Optimizer):
            super().__init__([group for part in parts for group in part.param_groups], {})
            self.parts = parts

        def step(self, closure=None):
            for part in self.parts:
                part.step()

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return Both(
        Muon(matrices, lr=learning_rate, weight_decay=0.1),
        torch.optim.AdamW(rest, lr=SCALE_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    )
