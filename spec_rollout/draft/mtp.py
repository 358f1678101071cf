"""The checkpoint's own multi-token prediction head as a draft: one more decoder layer of the policy's own kind.

transformers leaves its tensors out when it loads a policy. The names on disk are those that vLLM and SGLang read.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Cache

from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.eagle import HeadConfig
from spec_rollout.draft.mtp_names import QWEN, Names, names_in, of_further, refuse_quantized
from spec_rollout.draft.policy_view import decoder_layers
from spec_rollout.engine.attention import GROUPED_SDPA
from spec_rollout.engine.kv_cache import SlotWindow
from spec_rollout.engine.support import cache_argument

FULL = "full_attention"


class MtpHead(nn.Module):
    """Predicts the token after next from (token i + 1, the policy's final hidden state at i).

    `fc` joins the two, each normed, and a decoder layer of the policy's own class with full attention reads them. The
    normed output goes through the policy's output head, and is what a further guess reads in place of a hidden state.
    Its interface is that of `EagleHead` but for the attention, which runs inside `read`, on a cache.

    Args:
        model: the policy.
        names: of the tensors on disk.
        experts: whether the layer has experts; None makes it like the policy's last one with full attention.

    Raises:
        ValueError: the policy has no decoder layer with full attention, or none with rotary positions.
    """

    own_output = None

    def __init__(self, model: nn.Module, names: Names = QWEN, experts: bool | None = None):
        super().__init__()
        config = copy.deepcopy(model.config.get_text_config(decoder=True))
        config._attn_implementation = GROUPED_SDPA
        place, rotary = _donor(model, experts), getattr(model.get_decoder(), "rotary_emb", None)
        if place is None or rotary is None:
            raise ValueError(
                f"{type(model).__name__} has no decoder layer with full attention and rotary positions, which an MTP "
                "head is."
            )
        donor, width = decoder_layers(model)[place], config.hidden_size
        norm = type(donor.input_layernorm)
        with torch.random.fork_rng(devices=[]):
            self.fc = nn.Linear(2 * width, width, bias=False)
            self.layers = nn.ModuleList([type(donor)(config, place)])
            self.pre_fc_norm_embedding = norm(width, eps=config.rms_norm_eps)
            self.pre_fc_norm_hidden = norm(width, eps=config.rms_norm_eps)
            self.final_norm = norm(width, eps=config.rms_norm_eps)
        self.norm = nn.Identity()
        self.register_buffer("feature_scale", torch.ones(width), persistent=False)
        layers = config.num_hidden_layers
        self.config = replace(
            HeadConfig.for_target(config), intermediate_size=config.intermediate_size, aux_layers=(layers,)
        )
        self.names = names
        self._borrowed = (rotary,)  # the policy's, and no part of this module
        self._cache_argument = cache_argument(self.layers[0])

    def _apply(self, fn, recurse: bool = True):
        """Moves the head; what is no weight, such as the routers' corrections, stays in float32 as in the policy."""
        held = [(module, name, buffer) for module in self.modules() for name, buffer in module._buffers.items()]
        super()._apply(fn, recurse)
        for module, name, buffer in held:
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(self.fc.weight.device)
        return self

    @property
    def fused_width(self) -> int:
        return self.config.hidden_size

    @property
    def finite(self) -> bool:
        """Whether no weight is NaN or infinite."""
        return all(bool(weight.isfinite().all()) for weight in self.parameters())

    def fuse(self, features: Tensor) -> Tensor:
        """The policy's final hidden states [..., H], as they are."""
        return features

    def folded(self) -> dict[str, Tensor]:
        return self.state_dict()

    def read(self, embeds: Tensor, hidden: Tensor, place: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """The normed output [N, T, H] at `place` [N, T] from `embeds` and `hidden` [N, T, H]; `mask` [N, 1, T, E] says
        what of the E entries of `cache`, after this pass, each sees."""
        pair = [self.pre_fc_norm_embedding(embeds.to(hidden.dtype)), self.pre_fc_norm_hidden(hidden)]
        x = self.fc(torch.cat(pair, -1))
        (rotary,) = self._borrowed
        axes = getattr(rotary, "mrope_section", None)  # of images; text has one position for all
        turns = rotary(x, place if axes is None else place[None].expand(3, -1, -1))
        given = {"attention_mask": mask, "position_embeddings": turns, "position_ids": place}
        output = self.layers[0](x, **given, **{self._cache_argument: cache})
        return self.final_norm(output[0] if isinstance(output, tuple) else output)

    @torch.no_grad()
    def cached_numbers(self) -> int:
        """How many numbers its layer keeps for a token; some keep none of the sizes that a config names."""
        cache, nothing = Unrolled(), self.fc.weight.new_zeros(1, 1, self.config.hidden_size)
        place = torch.zeros(1, 1, dtype=torch.long, device=nothing.device)
        self.read(nothing, nothing, place, place[None, None] == 0, cache)
        return cache.keys[0].numel() + cache.values[0].numel()

    def on_disk(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors under the names that checkpoints give them; weights in `dtype`, the rest in float32."""
        weights = {name for name, _ in self.named_parameters()}
        own = {name: t.detach().to(dtype if name in weights else t.dtype) for name, t in self.state_dict().items()}
        return {name: tensor.cpu().contiguous() for name, tensor in self.names.on_disk(own).items()}

    def apart(self) -> dict[str, Tensor]:
        """The tensors as they are, under those names, each expert's by itself: vLLM's loaders take no stacked ones."""
        return self.names._replace(stacked=False).on_disk({n: t.detach() for n, t in self.state_dict().items()})

    @classmethod
    def of(cls, model: nn.Module, tensors: dict[str, Tensor], source: str | Path, check: bool = False) -> MtpHead:
        """The first MTP layer among `tensors`, which are named as on disk, in float32; with `check` none of its
        weights are made.

        Raises:
            ValueError: they are not those of a layer of the policy's, are quantised, or, but with `check`, are not
                finite; `source` is named.
        """
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        names = names_in(tensors, layers) or QWEN
        first = {name: tensor for name, tensor in tensors.items() if not of_further(name, names)}
        refuse_quantized(first, source)
        given = names.own(first)
        with torch.device("meta") if check else nullcontext():
            head = cls(model, names, any(".experts." in name for name in given))
        own = {name: tensor.shape for name, tensor in head.state_dict().items()}
        shapes = {name: tensor.shape for name, tensor in given.items()}
        wrong = sorted(name for name in own.keys() | shapes.keys() if own.get(name) != shapes.get(name))
        if wrong:
            raise ValueError(
                f"The MTP tensors in {source} are not one decoder layer of this policy: {', '.join(wrong[:4])} "
                f"({len(wrong)} in all) are missing, foreign or of another shape."
            )
        if not check:
            head.load_state_dict({name: tensor.float() for name, tensor in given.items()})
            if not head.finite:
                raise ValueError(
                    f"The MTP tensors in {source} hold NaN or infinite numbers: copy them again, or let a head of its "
                    "own learn (draft_head='eagle3')."
                )
        return head


def _donor(model: nn.Module, experts: bool | None) -> int | None:
    """The policy's last decoder layer with full attention, and with or without `experts` where that is told."""
    layers = decoder_layers(model) or []
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or [FULL] * len(layers)
    full = [i for i in range(len(layers)) if kinds[i] == FULL]
    alike = [i for i in full if experts in (None, any(n.endswith(".experts") for n, _ in layers[i].named_modules()))]
    return max(alike or full, default=None)


class MtpDrafter(EagleDrafter):
    """Guesses with an `MtpHead`: as with an EAGLE head, but that the layer reads the cache by itself."""

    @cached_property
    def cached_numbers(self) -> int:
        return self.head.cached_numbers()

    def _cache(self) -> tuple[list[Tensor], list[Tensor]]:
        """The head's keys and values; the first pass makes them, of what size its layer needs."""
        return self.cache.keys, self.cache.values

    def _put(self, tokens: Tensor, hidden: Tensor, place: Tensor, extent: int, start: int) -> None:
        self._layer(tokens, hidden, place, extent, *self._cache(), start)

    def _through(self, embeds: Tensor, hidden: Tensor, place: Tensor, mask: Tensor, window: SlotWindow) -> Tensor:
        return self.head.read(embeds, hidden, place, mask, window)


class Unrolled(Cache):
    """Keys and values of several unrolled steps, one behind the other."""

    def __init__(self):
        super().__init__(layers=[])
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        self.keys.append(key_states)
        self.values.append(value_states)
        return torch.cat(self.keys, 2), torch.cat(self.values, 2)


def unrolled_mask(visible: Tensor, steps: int) -> Tensor:
    """Boolean [R, 1, N, P + steps · N]: entries `visible` [R, N, P] of the first step, and of each further one the key
    at the same start."""
    own = torch.eye(visible.shape[1], dtype=torch.bool, device=visible.device).expand(len(visible), -1, -1)
    return torch.cat([visible, *[own] * steps], -1)[:, None]
