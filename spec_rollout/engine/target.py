"""Any Hugging Face causal language model, run on ragged rows without model-specific code."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spec_rollout.engine.attention import GROUPED_SDPA, takes_grouped_sdpa
from spec_rollout.engine.compiled import Compiled, NotCompilableError
from spec_rollout.engine.kv_cache import SlotCache, SlotWindow, causal_mask
from spec_rollout.records import UnsupportedModelError

MASKED_LAYERS = ("full_attention", "sliding_attention")


class Target:
    """The policy as the decode loop sees it; with `compiled` its decoding passes run through torch's compiler.

    Raises:
        UnsupportedModelError: the architecture keeps a state that cannot be rolled back or masked per row.
        ValueError: the weights are not here (a ZeRO-3 policy that is not gathered), or torch cannot compile the model.
    """

    def __init__(self, model: nn.Module, compiled: bool = False):
        self.model = model
        self._compiled = Compiled(self._read, type(model).__name__) if compiled else None
        self.config = model.config.get_text_config(decoder=True)
        _refuse_unsupported(model, self.config)
        self._cache_argument = cache_argument(model)
        self.vocab_size = self.config.vocab_size
        self.context = getattr(self.config, "max_position_embeddings", None) or getattr(
            self.config, "n_positions", None
        )
        self.precision: torch.dtype | None = None
        """Of the arithmetic; known once the model has been probed."""

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """Evaluation mode without gradients, and an attention that takes masks; the model is left as it was found."""
        weight = self.model.get_input_embeddings().weight
        if weight.numel() == 0:
            raise ValueError(
                f"The policy's embedding has shape {tuple(weight.shape)}: its weights are partitioned (ZeRO-3) and "
                "not gathered. Generate inside TRL's unwrap_model_for_generation, with ds3_gather_for_generation=True."
            )
        training = [module for module in self.model.modules() if module.training]
        configs = {id(m.config): m.config for m in self.model.modules() if hasattr(m, "_supports_sdpa")}.values()
        attention = [config._attn_implementation for config in configs]
        try:
            for config in configs:
                config._attn_implementation = self._attention(config._attn_implementation)
            self.model.eval()
            with torch.no_grad():
                if self.precision is None:
                    self._probe()
                yield
        finally:
            for config, implementation in zip(configs, attention, strict=True):
                config._attn_implementation = implementation
            for module in training:
                module.training = True

    def _attention(self, implementation: str) -> str:
        if implementation not in ("eager", "sdpa"):
            implementation = "sdpa" if getattr(self.model, "_supports_sdpa", False) else "eager"
        return GROUPED_SDPA if implementation == "sdpa" and takes_grouped_sdpa(self.model) else implementation

    def forward(
        self,
        cache: SlotCache,
        slots: tuple[int, int],
        ids: Tensor,
        positions: Tensor,
        extent: int,
        keep_logits: int = 0,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Run `ids` [N, T] at `positions` [N, T] of the slots `slots` = (start, stop) and extend their cache.

        Returns the logits [N, T, V] (of the last `keep_logits` tokens, if given) and the hidden states: the residual
        stream before each layer and the final one after the norm, each [N, T, H].
        """
        if self._compiled is not None and slots[0] == keep_logits == 0 and cache.keys:
            return self._compiled(ids, positions, extent, cache.keys, cache.values)
        return self._pass(ids, positions, extent, cache.window(slots[0], positions, extent), keep_logits)

    def _read(
        self, ids: Tensor, positions: Tensor, extent: int, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """`forward` of the slots from 0 on whose buffers exist, as a function of tensors and sizes alone."""
        window = SlotWindow(keys, values, keys[0].shape[:2], 0, positions, extent)
        return self._pass(ids, positions, extent, window)

    def _pass(
        self, ids: Tensor, positions: Tensor, extent: int, window: SlotWindow, keep_logits: int = 0
    ) -> tuple[Tensor, Sequence[Tensor]]:
        # A guess may reach past the context; what it leads to is never emitted, it only must not be an invalid index.
        place = positions if self.context is None else positions.clamp(max=self.context - 1)
        output = self.model(
            input_ids=ids,
            position_ids=place,
            attention_mask=self._mask(positions, extent),
            use_cache=True,
            output_hidden_states=True,
            logits_to_keep=keep_logits,
            **{self._cache_argument: window},
        )
        return output.logits, output.hidden_states

    def canonical(self, ids: Tensor) -> Tensor:
        """Logits [V] after the tokens `ids` [n], from one plain forward pass over exactly those tokens.

        It depends on the tokens alone, not on how decoding arrived at them.
        """
        return self.model(input_ids=ids[None], use_cache=False, logits_to_keep=1).logits[0, -1]

    def _mask(self, positions: Tensor, extent: int) -> Tensor | dict[str, Tensor]:
        kinds = set(getattr(self.config, "layer_types", None) or ())
        window = getattr(self.config, "sliding_window", None)
        if not kinds:
            return self._as_taken(causal_mask(positions, extent, window))
        masks = {
            kind: self._as_taken(causal_mask(positions, extent, window if kind == "sliding_attention" else None))
            for kind in kinds
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _as_taken(self, mask: Tensor) -> Tensor:
        if self.config._attn_implementation != "eager":
            return mask
        return torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, torch.finfo(self.dtype).min)

    def _probe(self) -> None:
        """Decode two ragged rows both ways; a model that ignores a mask, a position or the cache shows itself here,
        and with an extent far beyond the rows also one that counts back from the cache's end."""
        length, width, extent = 6, 3, min(512, self.context or 512)
        ids = (torch.arange(2 * length, device=self.device) * 7 % self.vocab_size).view(2, length)
        cache = SlotCache()
        cache.allocate(3, extent + 1)
        start = torch.tensor([3, 1], device=self.device)
        whole = torch.stack([self.model(input_ids=row[None], use_cache=False).logits[0] for row in ids])
        try:
            every = torch.arange(length, device=self.device).expand(2, -1)
            self.forward(cache, (0, 2), ids[:, :3], every[:, :3], extent)
            positions = start[:, None] + torch.arange(width, device=self.device)
            logits, _ = self.forward(cache, (0, 2), ids.gather(1, positions), positions, extent)
        except NotCompilableError:
            raise
        except Exception as error:  # whatever it trips over, it cannot
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot decode ragged rows: {type(error).__name__}: {error}. {REMEDY}"
            ) from error
        expected = whole.gather(1, positions[..., None].expand_as(logits)).float()
        distance = (logits.float() - expected).abs().max() / expected.std().clamp(min=1e-6)
        precision = _precision(whole)
        bound = 1e-2 if precision in (torch.float32, torch.float64) else 0.25
        if not distance <= bound:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not decode ragged rows as it reads whole sequences: its logits "
                f"differ by {distance:.2g} standard deviations (bound {bound}). {REMEDY}"
            )
        self.precision = precision


REMEDY = "Sample it with TRL's own trainer, or use a policy with full or sliding-window softmax attention."


def cache_argument(model: nn.Module) -> str:
    """How the model's forward calls the cache: "cache", or "past_key_values" as before transformers 5.24."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's own takes anything
    return "cache" if "cache" in inspect.signature(type(base).forward).parameters else "past_key_values"


def _precision(logits: Tensor) -> torch.dtype:
    """The dtype whose digits `logits` carry: under autocast they may come as float32 and hold bfloat16 values."""
    for narrow in (torch.bfloat16, torch.float16):
        if torch.equal(logits, logits.to(narrow).to(logits.dtype)):
            return narrow
    return logits.dtype


def _refuse_unsupported(model: nn.Module, config) -> None:
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; only causal language models are decoded. {REMEDY}")
    foreign = sorted(set(getattr(config, "layer_types", None) or ()) - set(MASKED_LAYERS))
    if foreign:
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(map(repr, foreign))}; speculative decoding needs "
            f"{' or '.join(map(repr, MASKED_LAYERS))} layers, whose state can be masked per row. {REMEDY}"
        )
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(f"{name} keeps a recurrent state that cannot be rolled back. {REMEDY}")
