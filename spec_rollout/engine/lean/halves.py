"""The two halves of a decoder layer, before and after its attention, as functions of tensors alone: to be compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
"""By the names that configurations give them."""
EXAMPLE = 8
"""Tokens of the example that a half is traced with; what is compiled takes any number."""
BEFORE, AFTER, BEFORE_IN_HEAD = "before", "after", "before in the head"


@dataclass(frozen=True)
class Form:
    """Which computation one half of a layer is. Layers of one form differ in their numbers only.

    half: BEFORE, AFTER or BEFORE_IN_HEAD.
    heads: query heads, key heads, their size.
    shapes: of the weights by name, in the order in which they are given.
    offset: is added to the weights of norms.
    multiplier: of what is added to the residual stream.
    columns: whether products take tokens as columns, see `products`.
    """

    half: str
    heads: tuple[int, int, int]
    width: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    eps: float
    rope: bool = True
    offset: float = 0.0
    multiplier: float = 1.0
    act: str = "silu"
    columns: bool = False


def module_of(form: Form) -> nn.Module:
    """What computes `form`."""
    return {BEFORE: Before, AFTER: After, BEFORE_IN_HEAD: BeforeInHead}[form.half](form)


def example_of(form: Form) -> tuple[tuple, tuple]:
    """Arguments of that module, in float32 on the CPU, and which of their sizes may be any."""
    queries, keys, size = form.heads
    tokens, entries = torch.export.Dim("tokens", min=1), torch.export.Dim("entries", min=1)
    weights = [torch.zeros(shape) for _, shape in form.shapes]
    each, fixed, x = {0: tokens}, [None] * len(weights), torch.zeros(EXAMPLE, form.width)
    if form.half == AFTER:
        return (x, torch.zeros(EXAMPLE, queries // keys, keys, size), weights), (each, each, fixed)
    streams = [x, torch.zeros_like(x)] if form.half == BEFORE_IN_HEAD else [x]
    kept = [torch.zeros(4 * EXAMPLE * keys, size) for _ in range(2)]
    index = torch.arange(EXAMPLE * keys).view(EXAMPLE, keys)
    given = (*streams, torch.zeros(EXAMPLE, 2 * size), index, *kept, weights)
    return given, (*[each] * (len(streams) + 2), *[{0: entries}] * 2, fixed)


class _Half(nn.Module):
    def __init__(self, form: Form):
        super().__init__()
        self.form, self.names = form, [name for name, _ in form.shapes]

    def named(self, weights: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names, weights, strict=True))

    def norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.form.eps) * (weight + self.form.offset)

    def linear(self, x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
        weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
        if not self.form.columns:
            return F.linear(x, weight, bias)
        y = torch.mm(weight, x.t()).t()
        return y if bias is None else y + bias

    def write(
        self, read: Tensor, turn: Tensor, index: Tensor, keys: Tensor, values: Tensor, w: dict[str, Tensor]
    ) -> Tensor:
        """Keys and values of `read` [N, …] into the buffers at `index` [N, Hk]; the queries [N, G, Hk, D]."""
        queries, shared, size = self.form.heads
        if "qkv.weight" in w:
            parts = self.linear(read, w, "qkv").split([queries * size, shared * size, shared * size], -1)
        else:
            parts = [self.linear(read, w, name) for name in "qkv"]
        q, k, v = parts
        whole = "q_norm" in w and w["q_norm"].shape[0] != size
        if whole:
            q, k = self.norm(q, w["q_norm"]), self.norm(k, w["k_norm"])
        q, k, v = (part.reshape(-1, heads, size) for part, heads in ((q, queries), (k, shared), (v, shared)))
        if "q_norm" in w and not whole:
            q, k = self.norm(q, w["q_norm"]), self.norm(k, w["k_norm"])
        if self.form.rope:
            q, k = turned(q, turn), turned(k, turn)
        keys.index_copy_(0, index.flatten(), k.reshape(-1, size))
        values.index_copy_(0, index.flatten(), v.reshape(-1, size))
        return q.reshape(-1, shared, queries // shared, size).transpose(1, 2).contiguous()


class Before(_Half):
    def forward(
        self, x: Tensor, turn: Tensor, index: Tensor, keys: Tensor, values: Tensor, weights: list[Tensor]
    ) -> Tensor:
        """Queries [N, G, Hk, D] of the residual stream `x` [N, H] under the angles `turn` [N, 2 D] of a
        `rope.table`; keys and values go to `index` [N, Hk] of the buffers [E, D]."""
        w = self.named(weights)
        return self.write(self.norm(x, w.get("norm")), turn, index, keys, values, w)


class BeforeInHead(_Half):
    def forward(
        self,
        embeds: Tensor,
        hidden: Tensor,
        turn: Tensor,
        index: Tensor,
        keys: Tensor,
        values: Tensor,
        weights: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The same of embeddings and features [N, H] in the draft head; and the normed features."""
        w = self.named(weights)
        normed = self.norm(hidden, w["hidden_norm"])
        read = torch.cat([self.norm(embeds, w["norm"]), normed], -1)
        return self.write(read, turn, index, keys, values, w), normed


class After(_Half):
    def forward(self, x: Tensor, attended: Tensor, weights: list[Tensor]) -> Tensor:
        """The residual stream [N, H] after the layer, from `x` before it and what was attended to, [N, G, Hk, D]."""
        w, form = self.named(weights), self.form
        flat = attended.transpose(1, 2).reshape(-1, form.heads[0] * form.heads[2])
        x = x + self.norm(self.linear(flat, w, "o"), w.get("attention_out")) * form.multiplier
        read = self.norm(x, w.get("mlp_in"))
        if "both.weight" in w:
            gate, up = self.linear(read, w, "both").chunk(2, -1)
        else:
            gate, up = self.linear(read, w, "gate"), self.linear(read, w, "up")
        inner = ACTIVATIONS[form.act](gate) * up
        x = x + self.norm(self.linear(inner, w, "down"), w.get("mlp_out")) * form.multiplier
        return x.contiguous()  # the next program takes its arguments to lie in memory as its example did


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """`x` [N, heads, D] rotated by the angles `turn` [N, 2 D]: cos, -sin of one half, sin of the other."""
    size = x.shape[-1]
    half = size // 2
    cos, low, high = (part[:, None] for part in turn.split([size, half, half], -1))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos[..., :half] + b * low, b * cos[..., half:] + a * high], -1)
