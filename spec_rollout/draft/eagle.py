"""The draft head: one EAGLE-3 layer on fused target features, in the shape that vLLM and SGLang load."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ROPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Kinds of rotary embedding whose angles depend on the position alone, and the numbers that they need."""


@dataclass(frozen=True)
class HeadConfig:
    """Shape of a draft head. The names are those of a Llama config, so that they go to disk as they are.

    `aux_layers`: the residual stream after that many target layers is fused; three of them, low to high.
    `norm_before_residual`: the layer adds to its normed input, as in heads of the speculators library.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    aux_layers: tuple[int, ...]
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    norm_before_residual: bool = False
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)
    """As in a Llama config, `rope_type` and its numbers; None is plain rope."""

    @classmethod
    def for_target(cls, config) -> HeadConfig:
        """The head for a target's text config: its width and attention shape, an MLP of 8/3 its width."""
        hidden, layers = config.hidden_size, config.num_hidden_layers
        heads = config.num_attention_heads
        rope = getattr(config, "rope_parameters", None) or {}
        return cls(
            hidden_size=hidden,
            intermediate_size=-(-8 * hidden // 3 // 64) * 64,
            num_attention_heads=heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            vocab_size=config.vocab_size,
            aux_layers=tuple(sorted({min(2, max(1, layers // 2 - 1)), layers // 2, layers - 1})),
            rope_theta=float(rope.get("rope_theta") or 10000.0),
        )

    def to_dict(self) -> dict:
        return asdict(self)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        """In the dtype of `x`: under autocast the scale would otherwise stay float32 and miss the fused kernel."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Projections of the head's attention; q, k and v read [embedding, feature], 2H wide."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config = config
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)


class MLP(nn.Module):
    def __init__(self, config: HeadConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: HeadConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.mlp = MLP(config)


class EagleHead(nn.Module):
    """Predicts the token after next from (token i + 1, target feature i).

    The caller runs the attention between `project` and `combine`, because decoding reads a slot cache and training
    unrolls several steps. The embedding is the policy's own and not part of the module; so is the output head, unless
    `own_output` gives the size of a draft vocabulary for one that is trained with the rest (heads from elsewhere).
    """

    def __init__(self, config: HeadConfig, seed: int = 0, own_output: int | None = None):
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):  # torch's own initialisation must not move the policy's stream
            self.fc = nn.Linear(len(config.aux_layers) * config.hidden_size, config.hidden_size, bias=False)
            self.midlayer = Layer(config)
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            if own_output is not None:
                self.lm_head = nn.Linear(config.hidden_size, own_output, bias=False)
        self.register_buffer("feature_scale", torch.ones(self.fc.in_features), persistent=False)
        self.register_buffer("frequency", None, persistent=False)
        self.frequency, self.rope_size = frequencies(config)
        self._initialise(torch.Generator().manual_seed(seed))

    def _apply(self, fn, recurse: bool = True):
        """Moves the head; angles far into a text need the frequencies in float32, whatever the weights are in."""
        super()._apply(fn, recurse)
        self.frequency = frequencies(self.config)[0].to(self.fc.weight.device)
        return self

    def _initialise(self, generator: torch.Generator) -> None:
        """Small random weights; `fc` starts by passing the highest feature through."""
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    module.weight.normal_(0.0, 0.5 * module.in_features**-0.5, generator=generator)
            self.fc.weight.mul_(0.1)
            self.fc.weight[:, -self.config.hidden_size :] += torch.eye(self.config.hidden_size)

    @property
    def fused_width(self) -> int:
        """Of the target features that `fuse` takes."""
        return self.fc.in_features

    @property
    def own_output(self) -> Tensor | None:
        """[Vd, H], or None where the policy's output head serves."""
        return self.lm_head.weight if hasattr(self, "lm_head") else None

    @torch.no_grad()
    def fit_scale(self, features: Tensor, fresh: bool) -> None:
        """Measure `features` [N, n_aux * H + H] (fused layers, then the final state) and let `fc` learn from them
        at magnitude 1.

        Residual streams run from below 1 to several hundreds; a training step of `fc` on such an input would throw the
        head's state around, and what the layer adds to it would drown. The scales are powers of two, so that they fold
        into `fc` and out of it without rounding. A `fresh` head also takes over the magnitude of the final state in
        each channel as its `norm`; another head goes on computing what it computed.
        """
        width, size = self.config.hidden_size, self.fc.in_features
        blocks = features[:, :size].float().view(len(features), -1, width)
        magnitude = blocks.square().mean((0, 2)).sqrt().clamp(min=1e-6)
        scale = (-magnitude.log2().round()).exp2().repeat_interleave(width)
        if not fresh:
            self.fc.weight *= self.feature_scale / scale
        self.feature_scale.copy_(scale)
        if fresh:
            fused = F.rms_norm(self.fuse(features[:, :size].float() * scale), (width,), eps=self.config.rms_norm_eps)
            final = features[:, size:].float()
            ratio = final.square().mean(0).sqrt() / fused.square().mean(0).sqrt().clamp(min=1e-6)
            self.norm.weight.copy_(ratio.clamp(max=100.0))

    @property
    def finite(self) -> bool:
        """Whether no weight is NaN or infinite."""
        return all(bool(weight.isfinite().all()) for weight in self.parameters())

    def fuse(self, features: Tensor) -> Tensor:
        """[..., n_aux * H] concatenated target features, times `feature_scale`, to [..., H]."""
        return self.fc(features)

    def folded(self) -> dict[str, Tensor]:
        """The weights of a head that reads the features as they are: what decodes, and what goes to disk."""
        return {**self.state_dict(), "fc.weight": self.fc.weight.detach() * self.feature_scale}

    def project(self, embeds: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, heads, T, D], keys and values [N, kv_heads, T, D] of `embeds` and `hidden` [N, T, H] at
        `positions` [N, T]."""
        layer, attention = self.midlayer, self.midlayer.self_attn
        x = torch.cat([layer.input_layernorm(embeds), layer.hidden_norm(hidden)], -1)
        split = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = (p(x).view(split).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        return *rotate(q, k, positions, self.frequency, self.rope_size), v

    def combine(self, attended: Tensor, hidden: Tensor) -> Tensor:
        """The layer's output [N, T, H], before the norm, from the attention's [N, heads, T, D] and its input."""
        residual = self.midlayer.hidden_norm(hidden) if self.config.norm_before_residual else hidden
        x = residual + self.midlayer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        return x + self.midlayer.mlp(self.midlayer.post_attention_layernorm(x))


def frequencies(config: HeadConfig) -> tuple[Tensor, float]:
    """Angles per position [D/2], float32, and the factor by which the rotated vectors grow (1 but for yarn)."""
    half = config.head_dim // 2
    if config.rope_scaling is None:
        return config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half), 1.0
    scaling = config.rope_scaling
    reach = scaling.get("original_max_position_embeddings", 2048) * scaling["factor"]
    llama = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=int(reach),
        rope_parameters={**scaling, "rope_theta": config.rope_theta},
    )
    return ROPE_INIT_FUNCTIONS[scaling["rope_type"]](llama, torch.device("cpu"))


def turns(positions: Tensor, frequency: Tensor, size: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [..., D/2] of the angles at `positions` [...], times `size`."""
    angle = positions[..., None].float() * frequency
    return (angle.cos() * size).to(dtype), (angle.sin() * size).to(dtype)


def rotate(q: Tensor, k: Tensor, positions: Tensor, frequency: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021), in the half-split layout of Llama."""
    half = q.shape[-1] // 2
    cos, sin = turns(positions[:, None], frequency, size, q.dtype)  # [N, 1, T, D/2]

    def turn(x: Tensor) -> Tensor:
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    return turn(q), turn(k)
