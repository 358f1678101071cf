"""Attention of the lean pass where rows bring unlike numbers of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spec_rollout.engine.lean.attention import Attention, Attentions
from spec_rollout.engine.lean.rope import Angles
from spec_rollout.engine.lean.views import LayerBuffers


class RaggedAttention(Attention):
    """For the tokens `kept` [N], places in a rectangle of `rows` x `width`: projections see N tokens, and only the
    kernel sees the rectangle, of which the other queries are whatever lies there."""

    def __init__(self, rows: int, width: int, kept: Tensor, attentions: Attentions):
        queries, keys, size = attentions.heads
        buffers = attentions.buffers(rows * width)
        super().__init__(len(kept), 1, attentions.heads, buffers)
        self.kept = kept
        rectangle = buffers[2][: rows * width * queries * size]
        self._rectangle = rectangle.view(rows, keys, width * self.groups, size)
        self._lanes = rectangle.view(rows * keys * width, self.groups * size)
        row, place = kept // width, kept % width
        lane = (row[:, None] * keys + torch.arange(keys, device=kept.device)) * width + place[:, None]
        self._places = lane.flatten()  # [N · Hk]
        self._by_token = (rows * width, self.groups, keys, size)
        self._output_by_key = self._output.view(len(kept), keys, self.groups, size)

    def attend(
        self, angles: Angles | None, mask: Tensor, index: Tensor, buffers: LayerBuffers, scaling: float
    ) -> Tensor:
        query, key = self._unturned if angles is None else self._turn(*angles)
        flat_keys, flat_values, cached_keys, cached_values = buffers
        flat_keys.index_copy_(0, index, key)
        flat_values.index_copy_(0, index, self.values)
        self._lanes.index_copy_(0, self._places, query.reshape(self._places.shape[0], -1))
        output = F.scaled_dot_product_attention(self._rectangle, cached_keys, cached_values, mask, scale=scaling)
        self._output_by_key.copy_(output.transpose(1, 2).reshape(self._by_token)[self.kept].transpose(1, 2))
        return self._output
