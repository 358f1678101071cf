"""The lean pass: a decode pass of policies of the Llama shape in about thirty operations per layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spec_rollout.engine.kv_cache import SlotCache, causal_mask
from spec_rollout.engine.lean.norms import read_norm
from spec_rollout.engine.lean.projections import Projection
from spec_rollout.engine.lean.recognition import base_model
from spec_rollout.engine.lean.rope import RopeTables, rotate
from spec_rollout.engine.lean.views import Streams, Views
from spec_rollout.engine.lean.weights import Family, LayerWeights, read_layer

FULL, SLIDING = "full_attention", "sliding_attention"


class LeanPass:
    """Computes what `model`'s own forward computes, on the weights as they are when it is made: one for each rollout.

    Nothing large is copied. Weights of norms are, and the tables of rope.
    """

    def __init__(self, model: nn.Module, family: Family):
        base = base_model(model)
        decoder, self.config = base.get_decoder(), base.config
        count = self.config.num_hidden_layers
        layers = list(decoder.layers)[:count]
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None) or [SLIDING if window else FULL] * count
        self.windows = {kind: window if kind == SLIDING else None for kind in kinds}
        self.layers = [read_layer(layer, family, kind) for layer, kind in zip(layers, kinds, strict=True)]
        self.embed, self.embed_scale = decoder.embed_tokens, getattr(decoder, "embedding_multiplier", 1.0)
        self.norm = read_norm(decoder.norm, family.norm_offset)
        self.output = Projection(base.get_output_embeddings())
        self.logits_scale = getattr(self.config, "logits_scaling", 1.0)
        self.softcap = getattr(self.config, "final_logit_softcapping", None)
        like = decoder.embed_tokens.weight.new_empty(1)
        self.rope = RopeTables(decoder.rotary_emb, set(kinds), like, self.config.max_position_embeddings)
        self.views = Views()
        self.zero, self.never = like.new_zeros(()), like.new_full((), -torch.inf)

    def __call__(self, cache: SlotCache, ids: Tensor, positions: Tensor, extent: int) -> tuple[Tensor, Sequence]:
        """Run `ids` [B, T] at `positions` [B, T] of the slots from 0 on, extend their cache and attend to its first
        `extent` entries; returns what `Target.forward` returns."""
        rows, width = ids.shape
        self.rope.reach(cache.capacity)
        place = positions.flatten()
        angles = self.rope.at(place)
        masks = {kind: self._mask(positions, extent, window) for kind, window in self.windows.items()}
        index = self.views.index(cache, positions)
        x = self.embed(ids.flatten())
        if self.embed_scale != 1.0:
            x = x * self.embed_scale
        streams = []
        keys_values = self.views.of(cache, rows, extent)
        for layer, buffers in zip(self.layers, keys_values, strict=True):
            streams.append(x)
            x = self._layer(layer, x, angles[layer.kind], masks[layer.kind], index, buffers, (rows, width))
        x = self.norm(x)
        streams.append(x)
        logits = self.output(x)
        if self.logits_scale != 1.0:
            logits = logits / self.logits_scale
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits.view(rows, width, -1), Streams(streams, rows, width)

    def _mask(self, positions: Tensor, extent: int, window: int | None) -> Tensor:
        """What is added to scores, [B, 1, T · G, extent], G query heads of one key head one after the other."""
        queries, keys, _ = self.layers[0].heads
        seen = causal_mask(positions.repeat_interleave(queries // keys, 1), extent, window)
        return torch.where(seen, self.zero, self.never)

    def _layer(
        self,
        layer: LayerWeights,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor,
        index: Tensor,
        buffers: tuple[Tensor, Tensor, Tensor, Tensor],
        shape: tuple[int, int],
    ) -> Tensor:
        """One decoder layer over the residual stream `x` [N, H]."""
        attended = self._attend(layer, x, angles, mask, index, buffers, shape)
        x = _add(x, layer.o_proj, attended, layer.attention_out, layer.residual_multiplier)
        inner = layer.mlp.inner(x if layer.mlp_in is None else layer.mlp_in(x))
        return _add(x, layer.mlp.down, inner, layer.mlp_out, layer.residual_multiplier)

    def _attend(
        self,
        layer: LayerWeights,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor,
        index: Tensor,
        buffers: tuple[Tensor, Tensor, Tensor, Tensor],
        shape: tuple[int, int],
    ) -> Tensor:
        """What attention reads for `x` [N, H], before the output projection: [N, Hq · D]."""
        queries, keys, size = layer.heads
        rows, width = shape
        qkv = layer.qkv(x if layer.attention_in is None else layer.attention_in(x))
        heads = qkv.view(-1, queries + 2 * keys, size)
        both = _normed(layer, qkv, heads)
        if layer.rope:
            both = rotate(both, *angles)
        flat_keys, flat_values, cached_keys, cached_values = buffers
        flat_keys.index_copy_(0, index, both[:, queries:])
        flat_values.index_copy_(0, index, heads[:, queries + keys :])
        groups = queries // keys
        query = both[:, :queries].view(rows, width, keys, groups, size).transpose(1, 2)
        output = F.scaled_dot_product_attention(
            query.reshape(rows, keys, width * groups, size), cached_keys, cached_values, mask, scale=layer.scaling
        )
        output = output.view(rows, keys, width, groups, size).transpose(1, 2)
        return output.reshape(rows * width, queries * size)


def _normed(layer: LayerWeights, qkv: Tensor, heads: Tensor) -> Tensor:
    """Queries and keys [N, Hq + Hk, D] after their norms, if they have some."""
    queries, keys, size = layer.heads
    if layer.q_norm is None:
        return heads[:, : queries + keys]
    if layer.whole_norm:
        q, k = qkv[:, : queries * size], qkv[:, queries * size : (queries + keys) * size]
        return torch.cat([layer.q_norm(q), layer.k_norm(k)], 1).view(-1, queries + keys, size)
    return torch.cat([layer.q_norm(heads[:, :queries]), layer.k_norm(heads[:, queries : queries + keys])], 1)


def _add(x: Tensor, projection: Projection, inner: Tensor, norm, multiplier: float) -> Tensor:
    """The residual stream after one more contribution."""
    if norm is None and multiplier == 1.0:
        return projection.onto(x, inner)
    more = projection(inner)
    return torch.add(x, more if norm is None else norm(more), alpha=multiplier)
