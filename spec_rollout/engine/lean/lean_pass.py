"""The lean pass: a decode pass of policies of the Llama shape in fewer than thirty operations per layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.engine.lean.attention import Attention, Attentions
from spec_rollout.engine.lean.norms import Norm, read_norm
from spec_rollout.engine.lean.products import columns_like, tokens_as_columns
from spec_rollout.engine.lean.projections import Projection
from spec_rollout.engine.lean.recognition import base_model
from spec_rollout.engine.lean.rope import RopeTables
from spec_rollout.engine.lean.views import Streams, index_of, views_of
from spec_rollout.engine.lean.weights import Family, LayerWeights, read_layer

FULL, SLIDING = "full_attention", "sliding_attention"


class LeanPass:
    """Computes what `model`'s own forward computes, on the weights as they are when it is made: one for each rollout.

    Nothing large is copied. Weights of norms are, and the tables of rope. With `columns` its tokens are columns of the
    residual stream, as `products` finds faster or not where it is not said.
    """

    path = "lean"
    """What `Target.path` calls it."""

    def __init__(self, model: nn.Module, family: Family, columns: bool | None = None):
        base = base_model(model)
        decoder, self.config = base.get_decoder(), base.config
        count = self.config.num_hidden_layers
        layers = list(decoder.layers)[:count]
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None) or [SLIDING if window else FULL] * count
        self.windows = {kind: window if kind == SLIDING else None for kind in kinds}
        like = decoder.embed_tokens.weight.new_empty(1)
        self.columns = tokens_as_columns(like) if columns is None else columns
        pairs = zip(layers, kinds, strict=True)
        self.layers = [read_layer(layer, family, kind, self.columns) for layer, kind in pairs]
        self.embed, self.embed_scale = decoder.embed_tokens, getattr(decoder, "embedding_multiplier", 1.0)
        self.norm = read_norm(decoder.norm, family.norm_offset, self.columns)
        self.output = Projection(base.get_output_embeddings(), self.columns)
        self.logits_scale = getattr(self.config, "logits_scaling", 1.0)
        self.softcap = getattr(self.config, "final_logit_softcapping", None)
        self.rope = RopeTables(decoder.rotary_emb, set(kinds), like, self.config.max_position_embeddings)
        reads = (self.config.hidden_size, self.layers[0].mlp.width) if self.columns else ()
        self.attentions = Attentions(self.layers[0].heads, like, reads, self.columns)

    def __call__(self, cache: SlotCache, ids: Tensor, positions: Tensor, extent: int) -> tuple[Tensor, Streams]:
        """Run `ids` [B, T] at `positions` [B, T] of the slots from 0 on, extend their cache and attend to its first
        `extent` entries; returns what `Target.forward` returns."""
        rows, width = ids.shape
        attention = self.attentions.of(rows, width)
        self.rope.reach(cache.capacity)
        angles = self.rope.at(positions.flatten())
        masks = {kind: attention.mask(positions, extent, window) for kind, window in self.windows.items()}
        index = index_of(cache, positions)
        read, inner = attention.reads if self.columns else (None, None)
        x = self._embedded(ids)
        x = x.t() if self.columns else x
        streams = []
        for layer, buffers in zip(self.layers, views_of(cache, rows, extent), strict=True):
            streams.append(x)
            _project(layer, x if layer.attention_in is None else layer.attention_in(x, read), attention)
            kind = layer.kind
            attended = attention.attend(
                angles[kind] if layer.rope else None, masks[kind], index, buffers, layer.scaling
            )
            x = _add(x, layer.o_proj, attended, layer.attention_out, layer.residual_multiplier)
            found = layer.mlp.inner(x if layer.mlp_in is None else layer.mlp_in(x, read), inner)
            x = _add(x, layer.mlp.down, found, layer.mlp_out, layer.residual_multiplier)
        x = self._last(x)
        streams.append(x)
        return self._logits(x).view(rows, width, -1), Streams(streams, rows, width, self.columns)

    def _embedded(self, ids: Tensor) -> Tensor:
        x = self.embed(ids.flatten()).detach()  # a hook may have asked for gradients
        return x if self.embed_scale == 1.0 else x * self.embed_scale

    def _last(self, x: Tensor) -> Tensor:
        """The residual stream behind the final norm, in memory as products read it."""
        return self.norm(x, columns_like(x.new_empty(x.numel()), x.shape[1]) if self.columns else None)

    def _logits(self, x: Tensor) -> Tensor:
        logits = self.output(x)
        if self.columns:  # sampling goes along the vocabulary
            logits = logits.t().contiguous()
        if self.logits_scale != 1.0:
            logits = logits / self.logits_scale
        return logits if not self.softcap else torch.tanh(logits / self.softcap) * self.softcap


def _project(layer: LayerWeights, read: Tensor, attention: Attention) -> None:
    """Queries, keys and values of `read` [N, H], put where attention reads them."""
    for projection, part in zip(layer.qkv, attention.parts if len(layer.qkv) > 1 else (attention.whole,), strict=True):
        projection(read, part)
    if layer.head_norm is not None:
        layer.head_norm(attention.queries_keys, attention.queries_keys)
    elif layer.whole_norms is not None:
        for norm, part in zip(layer.whole_norms, attention.parts[:2], strict=True):
            norm(part, part)


def _add(x: Tensor, projection: Projection, inner: Tensor, norm: Norm | None, multiplier: float) -> Tensor:
    """The residual stream after one more contribution."""
    if norm is None and multiplier == 1.0:
        return projection.onto(x, inner)
    more = projection(inner)
    more = more if norm is None else norm(more)
    return x + (more if multiplier == 1.0 else more * multiplier)
