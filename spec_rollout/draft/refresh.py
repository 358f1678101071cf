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
BATCH_TOKENS = 2048
WARM_UP_STEPS = 10


class DraftTrainer:
    """Trains `head` (float32) towards the target's own distribution: divergence over the draft vocabulary.

    The distribution is recomputed from the kept final hidden states, so nothing of the vocabulary's size is stored.
    Optimiser and random stream are its own; the policy and its stream are not touched.
    """

    def __init__(self, head: EagleHead, view: PolicyView, learning_rate: float, seed: int = 0):
        self.head, self.view = head, view
        self.optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.learning_rate = learning_rate
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0

    def train(self, buffer: FeatureBuffer, steps: int) -> RefreshStats:
        """At most `steps` optimiser steps on the buffer's rollouts, newest version first."""
        began = time.perf_counter()
        stats, losses = RefreshStats(), []
        while stats.steps < steps and buffer.samples:
            for batch in self._epoch(buffer)[: steps - stats.steps]:
                losses.append(self._step(batch))
                stats.steps += 1
                stats.tokens += int(batch.learn.sum())
        if losses:
            stats.loss = torch.stack(losses).mean().item()
        stats.seconds = time.perf_counter() - began
        return stats

    def _epoch(self, buffer: FeatureBuffer) -> list[Pack]:
        order = torch.randperm(len(buffer.samples), generator=self.generator).tolist()
        packed = pack([buffer.samples[i] for i in order], PACK_WIDTH)
        rows = max(1, BATCH_TOKENS // PACK_WIDTH)
        shuffled = torch.randperm(len(packed.tokens), generator=self.generator).to(packed.tokens.device)
        return [Pack(*(x[index] for x in packed)) for index in shuffled.split(rows)]

    @torch.enable_grad()
    def _step(self, batch: Pack) -> Tensor:
        loss = self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, self.steps / WARM_UP_STEPS)
        self.optimizer.step()
        return loss.detach()

    def loss(self, batch: Pack) -> Tensor:
        """Mean Kullback-Leibler divergence over entries and unrolled steps (the gradient is that of soft cross-entropy), the steps weighted by `STEP_DECAY`."""
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
