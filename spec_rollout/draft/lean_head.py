"""The draft head's layer in few operations, on the weights of one rollout."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spec_rollout.draft.eagle import EagleHead, turns
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.engine.compiled import NotCompilableError
from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.engine.lean.attention import Attentions, mask_of
from spec_rollout.engine.lean.compiled_pass import CompiledLayer
from spec_rollout.engine.lean.graphs import Graphs, Recorder, recorder
from spec_rollout.engine.lean.halves import Form
from spec_rollout.engine.lean.layer_tensors import Halves, halves_of_head
from spec_rollout.engine.lean.norms import read_norm
from spec_rollout.engine.lean.products import tokens_as_columns
from spec_rollout.engine.lean.programs import PROGRAMS, CannotCompileError, Program
from spec_rollout.engine.lean.projections import GatedMLP, Projection
from spec_rollout.engine.lean.rope import angles, table
from spec_rollout.engine.lean.views import index_of, views_of

BOUND = 1e-4
"""Most that compiled passes of the head may differ from others, in standard deviations of the output."""


class LeanHead:
    """Computes `EagleHead.project`, attention over a slot cache and `combine` as one pass without gradients. With
    `columns` its tokens are columns, as `products` finds faster or not where it is not said."""

    def __init__(self, head: EagleHead, view: PolicyView, columns: bool | None = None):
        self.config, self.view = head.config, view
        self.like = head.fc.weight.new_empty(1)
        self.columns = columns = tokens_as_columns(self.like) if columns is None else columns
        layer, attention = head.midlayer, head.midlayer.self_attn
        norms = layer.input_layernorm, layer.hidden_norm, layer.post_attention_layernorm, head.norm
        found = (read_norm(norm, columns=columns) for norm in norms)
        self.input_norm, self.hidden_norm, self.mlp_norm, self.norm = found
        self.qkv = [Projection(p, columns) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.o_proj, self.mlp = Projection(attention.o_proj, columns), GatedMLP(layer.mlp, F.silu, columns)
        config = self.config
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.head, self.table = head, self.like[:0]
        reads = (2 * config.hidden_size, *((config.hidden_size, self.mlp.width) if columns else ()))
        self.attentions = Attentions(self.heads, self.like, reads, columns)

    def reach(self, capacity: int) -> None:
        """Angles for slots of `capacity` entries."""
        if capacity > len(self.table):
            places = torch.arange(capacity, device=self.like.device)
            cos, sin = turns(places, self.head.frequency, self.head.rope_size, self.like.dtype)
            self.table = table(cos.repeat(1, 2), sin.repeat(1, 2))

    def scores(self, hidden: Tensor, output_rows: Tensor) -> Tensor:
        """Those [B, Vd] over `output_rows` [Vd, H] that the layer's output `hidden` [B, H] leads to."""
        if not self.columns:
            return torch.mm(self.norm(hidden), output_rows.t())
        rows, at_least_two = len(hidden), hidden if len(hidden) > 1 else hidden.expand(2, -1)
        read = self.attentions.of(len(at_least_two), 1).reads[1]
        return torch.mm(output_rows, self.norm(at_least_two.t(), read))[:, :rows].t().contiguous()

    def __call__(self, ids: Tensor, hidden: Tensor, place: Tensor, extent: int, cache: SlotCache) -> Tensor:
        """The layer's output [B, T, H] for tokens `ids` and features `hidden` [B, T, H] at entries `place` [B, T] of
        the slots from 0 on; extends the head's cache and attends to its first `extent` entries."""
        if self.columns and ids.numel() == 1:  # two columns take less time than one, see `products`
            pair = ids.expand(1, 2), hidden.expand(1, 2, -1), place.expand(1, 2)
            return self._pass(*pair, extent, cache)[:, :1]
        return self._pass(ids, hidden, place, extent, cache)

    def _pass(self, ids: Tensor, hidden: Tensor, place: Tensor, extent: int, cache: SlotCache) -> Tensor:
        rows, width = ids.shape
        self.reach(cache.capacity)
        attention = self.attentions.of(rows, width)
        size = self.config.hidden_size
        read, mlp_read, inner = attention.reads if self.columns else (*attention.reads, None, None)
        x, embeds = hidden.reshape(rows * width, size), self.view.embed(ids.flatten()).to(hidden.dtype)
        if self.columns:
            x, embeds = x.t(), embeds.t()
        first, second = read.split(size, 0 if self.columns else 1)
        self.input_norm(embeds, first)
        normed = self.hidden_norm(x, second)
        for projection, part in zip(self.qkv, attention.parts, strict=True):
            projection(read, part)
        turn = angles(self.table[place.flatten()])
        mask = attention.mask(place, extent, None)
        (buffers,) = views_of(cache, rows, extent)
        index = index_of(cache, place)
        attended = attention.attend(turn, mask, index, buffers, self.config.head_dim**-0.5)
        x = self.o_proj.onto(normed if self.config.norm_before_residual else x, attended)
        x = self.mlp.down.onto(x, self.mlp.inner(self.mlp_norm(x, mlp_read), inner))
        return (x.t() if self.columns else x).view(rows, width, size)


class CompiledHead(LeanHead):
    """Computes what `LeanHead` computes, with compiled halves of its layer."""

    def __init__(self, head: EagleHead, view: PolicyView, programs: dict[Form, Program]):
        super().__init__(head, view)
        self.compiled = CompiledLayer(halves_of(head), programs, self.config.head_dim**-0.5)

    def _pass(self, ids: Tensor, hidden: Tensor, place: Tensor, extent: int, cache: SlotCache) -> Tensor:
        rows, width = ids.shape
        queries, shared, _ = self.heads
        self.reach(cache.capacity)
        x = hidden.reshape(rows * width, -1).contiguous()
        (kept,) = views_of(cache, rows, extent)
        given = [self.table[place.flatten()], index_of(cache, place), *kept[:2]]
        embeds = self.view.embed(ids.flatten())
        query, normed = self.compiled.before([embeds, x, *given, *self.compiled.weights_before])
        attended = self.compiled.attend(query, kept, mask_of(place, extent, None, queries // shared), (rows, width))
        residual = normed if self.config.norm_before_residual else x
        return self.compiled.after([residual, attended, *self.compiled.weights_after])[0].view(rows, width, -1)


class GraphedHead:
    """Computes what `lean` computes, recorded."""

    def __init__(self, lean: LeanHead, recorder: Recorder, strict: bool):
        self.lean, self.graphs = lean, Graphs(recorder, strict)

    def __call__(self, ids: Tensor, hidden: Tensor, place: Tensor, extent: int, cache: SlotCache) -> Tensor:
        def run(ids: Tensor, hidden: Tensor, place: Tensor, extent: int) -> tuple[Tensor, ...]:
            return (self.lean(ids, hidden, place, extent, cache).flatten(0, 1),)

        (output,) = self.graphs(run, cache, (ids, hidden, place), 2, extent, self.lean.attentions.of)
        return output.view(*ids.shape, -1)


def halves_of(head: EagleHead) -> Halves | None:
    """What of `head` is compiled; None where it cannot be."""
    config = head.config
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    return halves_of_head(head.midlayer, heads, config.hidden_size)


def lean_head(head: nn.Module, view: PolicyView, compiles: str, folder: str | None) -> LeanHead | GraphedHead | None:
    """The pass on the weights of now, recorded or compiled where `compiles` is "true", or "auto" and that is possible
    by now; None where `head` is no EAGLE-3 head."""
    if not isinstance(head, EagleHead):
        return None
    if compiles == "false":
        return LeanHead(head, view)
    records = recorder(head.fc.weight.device)
    if records is not None:
        return GraphedHead(LeanHead(head, view, columns=False), records, strict=compiles == "true")
    wait = compiles == "true"
    try:
        programs = programs_of(head, view, folder, wait, begin=wait or PROGRAMS.begun)
        if isinstance(programs, dict):
            return compiled_head(head, view, programs)
    except NotCompilableError as error:
        if wait:
            raise
        warnings.warn(f"{error} With 'auto' it is decoded without.", RuntimeWarning, stacklevel=2)
    return LeanHead(head, view)


def programs_of(
    head: nn.Module, view: PolicyView, folder: str | None, wait: bool, begin: bool = True
) -> bool | dict[Form, Program]:
    """The compiled halves of the layer of `head`, which are kept in `folder`; see `Programs.get` for the rest. True
    while they are not there or where passes are recorded, False where it cannot be compiled so.

    Raises:
        NotCompilableError: torch or the C++ compiler that it runs fails.
    """
    if isinstance(head, EagleHead) and recorder(head.fc.weight.device) is not None:
        return True
    halves = halves_of(head) if isinstance(head, EagleHead) else None
    if halves is None or view.embedding.dtype != torch.float32:
        return False
    try:
        return PROGRAMS.get({half.form for half in halves}, folder, wait, begin) or True
    except CannotCompileError as error:
        raise NotCompilableError.of("the draft head", str(error)) from error


def compiled_head(head: EagleHead, view: PolicyView, programs: dict[Form, Program]) -> CompiledHead:
    """The compiled pass, which is shown to compute what the other one does."""
    found = CompiledHead(head, view, programs)
    off = _disagreement(LeanHead(head, view), found)
    if not off <= BOUND:
        raise NotCompilableError.of("the draft head", f"compiled it is off by {off:.2g} standard deviations")
    return found


def _disagreement(lean: LeanHead, compiled: CompiledHead) -> float:
    """How far two passes over made-up entries differ, in standard deviations of their output."""
    rows, width, config = 3, 4, lean.config
    generator = torch.Generator().manual_seed(0)
    place = torch.tensor([[5], [0], [9]]) + torch.arange(width)
    ids = torch.arange(rows * width).view(rows, width) * 7 % len(lean.view.embedding)
    hidden = torch.randn(rows, width, config.hidden_size, generator=generator)
    _, heads, size = lean.heads
    kept = [torch.randn(rows, heads, 16, size, generator=generator) for _ in range(2)]
    found = []
    for head in (lean, compiled):
        cache = SlotCache()
        cache.allocate(rows, 16)
        cache.keys, cache.values = ([buffer.clone()] for buffer in kept)
        found += [torch.cat([head(ids, hidden, place, 16, cache), head(ids, hidden, place, 16, cache)])]
    return float((found[0] - found[1]).abs().max() / found[0].std())
