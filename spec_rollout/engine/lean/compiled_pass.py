"""The lean pass with compiled halves of layers between its attentions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.engine.lean.attention import mask_of
from spec_rollout.engine.lean.halves import Form
from spec_rollout.engine.lean.layer_tensors import Halves, halves_of
from spec_rollout.engine.lean.lean_pass import LeanPass
from spec_rollout.engine.lean.programs import Program
from spec_rollout.engine.lean.recognition import base_model
from spec_rollout.engine.lean.views import LayerBuffers, Streams, index_of, views_of
from spec_rollout.engine.lean.weights import Family


class CompiledLayer:
    """One layer's programs and the weights that they read, where they lie."""

    def __init__(self, halves: Halves, programs: dict[Form, Program], scaling: float):
        self.before, self.after = (programs[half.form] for half in halves)
        self.weights_before, self.weights_after = (half.weights for half in halves)
        self.scaling = scaling

    def attend(self, queries: Tensor, buffers: LayerBuffers, mask: Tensor, shape: tuple[int, int]) -> Tensor:
        """What `queries` [N, G, Hk, D] of (rows, width) tokens find in the cache, [N, G, Hk, D].

        G stands before Hk, so that the kernel reads [rows, Hk, T · G, D] and its output, as it lies, is read again,
        without a copy of either.
        """
        _, groups, shared, size = queries.shape
        rows, width = shape
        query = queries.view(rows, width * groups, shared, size).transpose(1, 2)
        found = F.scaled_dot_product_attention(query, buffers[2], buffers[3], mask, scale=self.scaling)
        return found.transpose(1, 2).reshape(-1, groups, shared, size).contiguous()


class CompiledPass(LeanPass):
    """Computes what `LeanPass` computes. None of the weights is copied."""

    path = "lean compiled"

    def __init__(self, model: nn.Module, family: Family, programs: dict[Form, Program]):
        super().__init__(model, family)
        halves = halves_of_model(model, family, self)
        pairs = zip(halves, self.layers, strict=True)
        self.compiled = [CompiledLayer(found, programs, layer.scaling) for found, layer in pairs]

    def __call__(self, cache: SlotCache, ids: Tensor, positions: Tensor, extent: int) -> tuple[Tensor, Streams]:
        rows, width = ids.shape
        queries, shared, _ = self.layers[0].heads
        self.rope.reach(cache.capacity)
        turns = self.rope.rows(positions.flatten())
        masks = {kind: mask_of(positions, extent, window, queries // shared) for kind, window in self.windows.items()}
        index = index_of(cache, positions)
        x = self._embedded(ids)
        streams = []
        buffers = views_of(cache, rows, extent)
        for layer, compiled, kept in zip(self.layers, self.compiled, buffers, strict=True):
            streams.append(x)
            (query,) = compiled.before([x, turns[layer.kind], index, *kept[:2], *compiled.weights_before])
            attended = compiled.attend(query, kept, masks[layer.kind], (rows, width))
            (x,) = compiled.after([x, attended, *compiled.weights_after])
        x = self._last(x.t() if self.columns else x)
        streams.append(x.t() if self.columns else x)
        return self._logits(x).view(rows, width, -1), Streams(streams, rows, width)


def halves_of_model(model: nn.Module, family: Family, lean: LeanPass) -> list[Halves] | None:
    """Both halves of every layer, as they are now; None where a layer cannot be compiled."""
    act = lean.config.hidden_act if hasattr(lean.config, "hidden_act") else lean.config.hidden_activation
    layers = list(base_model(model).get_decoder().layers)[: len(lean.layers)]
    found = [halves_of(layer, family, read, act) for layer, read in zip(layers, lean.layers, strict=True)]
    return None if None in found else found
