"""The head follows the policy: a few optimiser steps on the freshest rollouts."""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from spec_rollout.draft.eagle import EagleHead
from spec_rollout.draft.features import FeatureBuffer
from spec_rollout.draft.packing import Pack, pack
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.unroll import unroll
from spec_rollout.records import RefreshStats

UNROLLED_STEPS = 3
STEP_DECAY = 0.8
"""Weight of each further unrolled step in the loss (EAGLE-3)."""
PACK_WIDTH = 512
BATCH_TOKENS = 1024
MATRIX_RATE = 0.22
"""Learning rate of the matrices times the root of the hidden size, so that a step changes weights of any width by the
same share. With Muon at this rate a cold head learned from one rollout what took AdamW twice the time."""
SCALE_RATE = 4e-3
"""Learning rate of the norms' scales."""
WARM_UP_STEPS = 3
MAX_EPOCHS = 20


class DraftTrainer:
    """Trains `head` (float32) towards the target's own distribution: divergence over the draft vocabulary.

    The distribution is recomputed from the kept final hidden states, so nothing of the vocabulary's size is stored.
    Optimiser and random stream are its own; the policy and its stream are not touched.
    """

    def __init__(self, head: EagleHead, view: PolicyView, learning_rate: float | None = None, seed: int = 0):
        self.head, self.view = head, view
        rate = learning_rate or MATRIX_RATE * head.config.hidden_size**-0.5
        matrices = [p for p in head.parameters() if p.ndim == 2]
        scales = [p for p in head.parameters() if p.ndim != 2]
        self.optimizers = (
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(scales, lr=SCALE_RATE, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self.rates = (rate, SCALE_RATE)
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0
        self._step_seconds = 0.0
        device = head.fc.weight.device.type
        self.precision = torch.autocast(device, torch.bfloat16, enabled=_multiplies_bfloat16(device))

    def train(self, buffer: FeatureBuffer, seconds: float) -> RefreshStats:
        """Optimiser steps on the buffer's rollouts for `seconds`, at most MAX_EPOCHS times over.

        A step starts when the mean of the steps before it still fits.
        """
        began = time.perf_counter()
        stats, losses = RefreshStats(), []
        for batch in (batch for _ in range(MAX_EPOCHS) for batch in self._epoch(buffer)):
            elapsed = time.perf_counter() - began
            if elapsed + self._step_seconds > seconds:
                break
            losses.append(self._step(batch))
            stats.steps += 1
            stats.tokens += int(batch.learn.sum())
            self._step_seconds = (time.perf_counter() - began) / stats.steps
        if losses:
            stats.loss = torch.stack(losses).mean().item()
        stats.seconds = time.perf_counter() - began
        return stats

    def _epoch(self, buffer: FeatureBuffer) -> list[Pack]:
        if not buffer.samples:
            return []
        order = torch.randperm(len(buffer.samples), generator=self.generator).tolist()
        packed = pack([buffer.samples[i] for i in order], PACK_WIDTH)
        rows = max(1, BATCH_TOKENS // PACK_WIDTH)
        shuffled = torch.randperm(len(packed.tokens), generator=self.generator).to(packed.tokens.device)
        return [Pack(*(x[index] for x in packed)) for index in shuffled.split(rows)]

    @torch.enable_grad()
    def _step(self, batch: Pack) -> Tensor:
        with self.precision:
            loss = self.loss(batch)
        self.head.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self.steps += 1
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, self.steps / WARM_UP_STEPS)
            optimizer.step()
        return loss.detach()

    def loss(self, batch: Pack) -> Tensor:
        """Mean Kullback-Leibler divergence, whose gradient is that of soft cross-entropy, over entries and unrolled
        steps; a further step weighs `STEP_DECAY` of the one before."""
        rows = self.view.output_rows()
        with torch.no_grad():
            final = batch.features[..., self.head.fc.in_features :].roll(-1, 1)  # the state that predicts token p + 2
            target = self.view.logits(final[batch.learn], rows).softmax(-1)
            embeds = self.view.embed(batch.tokens).to(self.head.fc.weight.dtype)
            everywhere = torch.zeros(batch.learn.shape, dtype=torch.int64, device=rows.device)
            everywhere[batch.learn] = torch.arange(len(target), device=rows.device)
        rows = rows.to(embeds.dtype)
        total = weights = 0.0
        for j, (hidden, valid) in enumerate(unroll(self.head, embeds, batch, UNROLLED_STEPS)):
            use = batch.learn & valid
            log_q = F.linear(hidden[use], rows).float().log_softmax(-1)
            divergence = F.kl_div(log_q, target[everywhere[use]], reduction="none").sum(-1)
            total = total + STEP_DECAY**j * divergence.sum()
            weights += STEP_DECAY**j * max(1, len(divergence))
        loss = total / weights
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"The draft's loss is {loss.item()}.")
        return loss


def _multiplies_bfloat16(device: str) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32; the draft only loses a little sharpness."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
