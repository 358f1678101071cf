"""Policies with virtual tokens (PEFT's prompt, prefix and p-tuning): a prefix of keys and values in every slot.

The loop counts real tokens only. What it calls position t lies at position t + n of the model, behind n virtual
tokens, whose keys and values depend on the weights alone and are written into every slot when a rollout begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from spec_rollout.engine.kept_slot import Put
from spec_rollout.engine.kv_cache import SlotCache, SlotWindow
from spec_rollout.engine.state import state_of
from spec_rollout.engine.support import REMEDY
from spec_rollout.engine.target import Target
from spec_rollout.records import UnsupportedModelError

KEYS_AND_VALUES = "PREFIX_TUNING"
EMBEDDINGS = ("PROMPT_TUNING", "P_TUNING")
AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Most that logits may differ from the policy's own, in standard deviations; 0.25 in other dtypes."""


def virtual_tokens(model: nn.Module) -> int:
    """Virtual tokens that stand before every prompt of `model`; 0 for all but PEFT's prompt learning."""
    config = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0


def make_target(model: nn.Module, compiled: str = "false", folder: str | None = None) -> Target:
    """The policy as the decode loop sees it, with virtual tokens or without."""
    return PrefixedTarget(model, compiled) if virtual_tokens(model) else Target(model, compiled, folder)


class PrefixedTarget(Target):
    """A PEFT policy with virtual tokens.

    Raises:
        UnsupportedModelError: a kind of prompt learning that needs more than a prefix.
        ValueError: `compiled` is "true", which is for policies without virtual tokens.
    """

    def __init__(self, model: nn.Module, compiled: str = "false"):
        kind = str(getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type))
        if kind not in (KEYS_AND_VALUES, *EMBEDDINGS):
            raise UnsupportedModelError(
                f"PEFT's {kind} cannot be decoded on ragged rows; {KEYS_AND_VALUES}, {', '.join(EMBEDDINGS)} and "
                "adapters such as LoRA can. Use one of them, or sample it with TRL's own trainer."
            )
        if compiled == "true":
            raise ValueError(f"compile_passes=True cannot be honoured for PEFT's {kind}: set it to False.")
        super().__init__(model.get_base_model())
        if self.recurrent or self.switches:
            what = "recurrent layers" if self.recurrent else "a rope that switches by the number of tokens (longrope)"
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has {what}, which virtual tokens of PEFT's {kind} are not decoded with. "
                "Train it with adapters such as LoRA, or sample it with TRL's own trainer."
            )
        self.policy, self.kind = model, kind
        self.prefix: list[tuple[Tensor, Tensor]] = []
        """Keys and values of the virtual tokens, per layer [heads, n, head_dim]."""
        self._agrees = False

    @property
    def virtual(self) -> int:
        return virtual_tokens(self.policy)

    @property
    def room(self) -> int | None:
        return None if self.context is None else self.context - self.virtual

    @property
    def state(self) -> tuple:
        return state_of(self.policy), ()

    def make_cache(self) -> SlotCache:
        return PrefixedCache(self)

    @contextmanager
    def rollout(self) -> Iterator[None]:
        training = [module for module in self.policy.prompt_encoder.modules() if module.training]
        try:
            self.policy.prompt_encoder.eval()
            with super().rollout():
                self.prefix = self._read_prefix()
                if not self._agrees:
                    self._agree()
                yield
        finally:
            self.prefix = []
            for module in training:
                module.training = True

    def forward(
        self,
        cache: SlotCache,
        slots: tuple[int, int],
        ids: Tensor,
        positions: Tensor,
        extent: int,
        keep_logits: int = 0,
        lengths: Tensor | None = None,
        first: bool = False,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        if not isinstance(cache, PrefixedCache):
            return super().forward(cache, slots, ids, positions, extent, keep_logits, lengths, first)
        place, reach = positions + self.virtual, extent + self.virtual
        if self._lean is not None and slots[0] == keep_logits == 0:
            return self._lean(cache, ids, place, reach)
        return self._pass(ids, place, reach, cache.window(slots[0], positions, extent, lengths), keep_logits)

    def canonical(self, ids: Tensor) -> Tensor:
        return self.policy(input_ids=ids[None], use_cache=False, logits_to_keep=1).logits[0, -1]

    def _read_prefix(self) -> list[tuple[Tensor, Tensor]]:
        prompt = self.policy.get_prompt(batch_size=1)
        if self.kind != KEYS_AND_VALUES:
            embeddings, prompt = prompt.to(self.dtype), DynamicCache()
            self.model(inputs_embeds=embeddings, use_cache=True, **{self._cache_argument: prompt})
        if not isinstance(prompt, Cache):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} takes the prefix of {self.kind} as {type(prompt).__name__}. {REMEDY}"
            )
        return [(layer.keys[0], layer.values[0]) for layer in prompt.layers]

    def _agree(self) -> None:
        """Decode two ragged rows behind the virtual tokens, and compare with the policy's own forward."""
        length, width = 6, 3
        ids = (torch.arange(2 * length, device=self.device) * 7 % self.vocab_size).view(2, length)
        start = torch.tensor([3, 1], device=self.device)
        whole = torch.cat([self.policy(input_ids=row[None], use_cache=False).logits[:, -length:] for row in ids])
        cache = self.make_cache()
        cache.allocate(3, length + 1)
        every = torch.arange(length, device=self.device).expand(2, -1)
        self.forward(cache, (0, 2), ids[:, :3], every[:, :3], length)
        positions = start[:, None] + torch.arange(width, device=self.device)
        logits, _ = self.forward(cache, (0, 2), ids.gather(1, positions), positions, length)
        expected = whole.gather(1, positions[..., None].expand_as(logits)).float()
        error = (logits.float() - expected).abs().max() / expected.std().clamp(min=1e-6)
        bound = AGREEMENT.get(self.precision, 0.25)
        if not error <= bound:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} with {self.kind} does not decode ragged rows as it reads whole "
                f"sequences: its logits differ by {error:.2g} standard deviations (bound {bound}). {REMEDY}"
            )
        self._agrees = True


class PrefixedCache(SlotCache):
    """A slot cache for `target`, whose slots begin with its virtual tokens; sizes and positions are those of real
    tokens."""

    def __init__(self, target: PrefixedTarget):
        super().__init__()
        self.target = target

    def allocate(self, slots: int, capacity: int, kind: object = None) -> None:
        """Make room as `SlotCache` does, and write the virtual tokens of now into all slots."""
        virtual = self.target.virtual
        super().allocate(slots, capacity + virtual, kind)
        self.first = virtual
        if not self.keys:
            for buffers, part in ((self.keys, 0), (self.values, 1)):
                for layer in self.target.prefix:
                    heads, _, head_dim = layer[part].shape
                    buffers.append(layer[part].new_zeros(self.slots, heads, self.capacity, head_dim))
        for buffers, part in ((self.keys, 0), (self.values, 1)):
            for buffer, layer in zip(buffers, self.target.prefix, strict=True):
                buffer[:, :, :virtual] = layer[part]

    def resize(self, slots: int, capacity: int, kept: int, puts: Sequence[Put] = ()) -> None:
        virtual = self.target.virtual
        super().resize(slots, capacity + virtual, kept, puts)
        for buffers, part in ((self.keys, 0), (self.values, 1)):
            for buffer, layer in zip(buffers, self.target.prefix, strict=True):
                buffer[kept:, :, :virtual] = layer[part]

    def window(self, start: int, positions: Tensor, extent: int, lengths: Tensor | None = None) -> SlotWindow:
        return super().window(start, positions + self.target.virtual, extent + self.target.virtual, lengths)

    def clear_beyond(self, length: Tensor) -> None:
        super().clear_beyond(length + self.target.virtual)

    def copy(self, source: Tensor, target: Tensor, extent: int) -> None:
        super().copy(source, target, extent + self.target.virtual)
