"""Any Hugging Face causal language model, run on ragged rows without model-specific code."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from spec_rollout.engine.attention_choice import attend, first_proven
from spec_rollout.engine.compiled import Compiled
from spec_rollout.engine.kv_cache import SlotCache, SlotWindow
from spec_rollout.engine.lean.choice import DecodePass, LeanChoice
from spec_rollout.engine.masks import masks
from spec_rollout.engine.precision import rounds_products
from spec_rollout.engine.probe import STRIDES, Probe, prove
from spec_rollout.engine.recurrences import Recurrences, running
from spec_rollout.engine.state import state_of
from spec_rollout.engine.support import cache_argument, has_recurrent_layers, refuse_unsupported, rope_switches

REPAYS_S = 90.0
"""Seconds of rollouts after which compiling is expected to pay."""


class Target:
    """The policy as the decode loop sees it.

    With `compiled` "true" its decoding passes are CUDA graphs of the lean pass; on a CPU they run through torch's
    compiler: halves of the lean pass's layers, which are kept in `folder`, or where there is no lean pass the whole
    model. With "auto" the whole model is not compiled, and the halves serve from the rollout on that finds them there;
    they are compiled beside other rollouts, once these have taken REPAYS_S.

    Raises:
        UnsupportedModelError: the architecture keeps a state that cannot be rolled back or masked per row.
        ValueError: the weights are not here (a ZeRO-3 policy that is not gathered), or torch cannot compile the model.
    """

    def __init__(self, model: nn.Module, compiled: str = "false", folder: str | None = None):
        self.model, self.compiles, self.folder = model, compiled, folder
        self._whole = Compiled(self._read, type(model).__name__) if compiled == "true" else None
        self._seconds = 0.0  # of the rollouts so far
        self._compiled: Compiled | None = None
        """What decodes in this rollout, if it is the whole model compiled."""
        self._whole_proven: set[tuple] = set()
        self.config = model.config.get_text_config(decoder=True)
        self._recurrences = Recurrences(model)
        self.recurrent = has_recurrent_layers(model, self.config)
        """Whether a slot holds states beside keys and values; they move on with the row and cannot be taken back."""
        refuse_unsupported(model, self.config, self._recurrences.found, compiled == "true")
        self._cache_argument = cache_argument(model)
        self.vocab_size = self.config.vocab_size
        lengths = (getattr(self.config, name, None) for name in ("max_position_embeddings", "n_positions"))
        self.context: int | None = next(filter(None, lengths), None)
        self.path = "transformers"
        """What decoded the last rollout: "lean", "lean compiled", "lean graphs", "compiled" (the whole model) or
        "transformers"."""
        self._choice = LeanChoice(model)
        self._lean: DecodePass | None = None
        self.switches = rope_switches(self.config)
        self._reach = self.context
        self.precision: torch.dtype | None = None
        """Of the arithmetic of the latest pass. float32 whose products are rounded, as TF32, counts as bfloat16."""
        self._proven: dict[tuple, list[str]] = {}
        self._cache_bytes: dict[tuple, tuple[int, int]] = {}

    @property
    def cache_bytes(self) -> tuple[int, int]:
        """Of a slot: what it takes for each token, and besides. Seen once in a pass over two tokens."""
        state = self.dtype, torch.is_autocast_enabled(self.device.type)
        if state not in self._cache_bytes:
            cache, device = self.make_cache(), self.device
            cache.allocate(1, 2, (self.dtype, device))
            ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
            place, lengths = torch.arange(2, device=device)[None], torch.full((1,), 2, device=device)
            self.forward(cache, (0, 1), ids, place, 2, keep_logits=1, lengths=lengths)
            token = sum(b[0, :, 0].numel() * b.itemsize for b in (*cache.keys, *cache.values))
            slot = sum(b.numel() * b.itemsize for b in cache.states.buffers) + (cache.capacity - 2) * token
            self._cache_bytes[state] = token, slot
        return self._cache_bytes[state]

    @property
    def room(self) -> int | None:
        """Tokens that a prompt and its completion may have together; None without a bound."""
        return self.context

    def make_cache(self) -> SlotCache:
        """An empty cache for this policy's rows."""
        return SlotCache()

    @property
    def reads_pairs(self) -> bool:
        """Whether a pass takes two tokens rather than one. On a CPU, sums of bfloat16 products come out otherwise for
        a token alone than for one of two, which take no longer; and two columns of a product take less time."""
        columns = self._lean is not None and self._lean.columns
        return columns or (self.precision == torch.bfloat16 and self.device.type == "cpu")

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def state(self) -> tuple:
        """What keys and values depend on besides the tokens."""
        return state_of(self.model), self.switches and self._reach

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
        own = [config._attn_implementation for config in configs]
        began = time.perf_counter()
        try:
            self.model.eval()
            with torch.no_grad(), self._recurrences.installed():
                self._rounds_products = rounds_products(self.device)
                proven = (*own, self.dtype)
                if proven not in self._proven:
                    self._proven[proven] = self._probe(list(configs), own)
                attend(configs, self._proven[proven])
                self._choose(proven)
                yield
        finally:
            self._seconds += time.perf_counter() - began
            self._lean = self._compiled = None
            attend(configs, own)
            for module in training:
                module.training = True

    def _probe(self, configs: list, own: list[str]) -> list[str]:
        """The attention for each of `configs` under which this target decodes what the policy reads with its `own`, as
        the trainer runs it: the first of those it may take that is proven."""
        return first_proven(self, configs, own)

    def _choose(self, state: tuple) -> None:
        """Take the pass that decodes; `state` is what its proof depends on besides the weights."""
        given = self.forward, self.vocab_size, (self.dtype, self.device)
        if self.compiles == "auto":
            self._lean = self._choice.make_compiled_by_now(*given, self.folder, self._seconds >= REPAYS_S)
        elif self.compiles == "true":
            self._lean = self._choice.make_compiled(*given, self.folder)
        if self._lean is None and self._whole is None:
            self._lean = self._choice.make(*given)
        if self._lean is not None or self._whole is None:
            self.path = "transformers" if self._lean is None else self._lean.path
        else:
            self._take_whole(state)

    def _take_whole(self, state: tuple) -> None:
        """Decode through the whole model, compiled."""
        self._compiled, self.path = self._whole, "compiled"
        if state not in self._whole_proven:
            prove(self, [Probe(self, stride).expected() for stride in STRIDES])
            self._whole_proven.add(state)

    def confine(self, longest: int) -> None:
        """The rows to come have at most `longest` tokens."""
        self._reach = min((switch for switch in self.switches if switch >= longest), default=self.context)

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
        """Run `ids` [N, T] at `positions` [N, T] of the slots `slots` = (start, stop) and extend their cache.

        A prefill gives the `lengths` [N] of its rows, beyond which is padding, and says whether `positions` are the
        `first` ones, 0..T-1; a pass over guesses is followed by `SlotCache.commit`, which says how many came true.

        Returns the logits [N, T, V] (of the last `keep_logits` tokens, if given) and the hidden states: the residual
        stream before each layer and the final one after the norm, each [N, T, H].
        """
        if self._lean is not None and slots[0] == keep_logits == 0 and cache.begun:
            output: tuple[Tensor, Sequence[Tensor]] = self._lean(cache, ids, positions, extent)
        elif self._compiled is not None and slots[0] == keep_logits == 0 and cache.begun:
            return self._compiled(ids, positions, extent, cache.keys, cache.values)
        else:
            window = cache.window(slots[0], positions, extent, lengths)
            output = self._pass(ids, positions, extent, window, keep_logits, first)
        self.precision = self._narrowest(output[0].dtype, cache)
        return output

    def _narrowest(self, logits: torch.dtype, cache: SlotCache) -> torch.dtype:
        """Of the arithmetic of a pass that gave `logits`. The weights do not tell it under autocast, nor do the logits
        alone: the output head may be the one part in float32, and autocast hands out float32 that holds bfloat16. The
        values that attention reads come from products as they are."""
        found = {logits, *(values.dtype for values in cache.values)}
        narrow = sorted(found, key=lambda dtype: torch.finfo(dtype).eps)[-1]
        return torch.bfloat16 if narrow == torch.float32 and self._rounds_products else narrow

    def _read(
        self, ids: Tensor, positions: Tensor, extent: int, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """`forward` of the slots from 0 on whose buffers exist, as a function of tensors and sizes alone."""
        window = SlotWindow(keys, values, keys[0].shape[::2], 0, positions, extent)
        return self._pass(ids, positions, extent, window)

    def _pass(
        self,
        ids: Tensor,
        positions: Tensor,
        extent: int,
        window: SlotWindow,
        keep_logits: int = 0,
        first: bool = False,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        # A guess, or padding, may reach past the rows' ends. What it leads to is never emitted; it only must not be an
        # invalid index, nor switch the rope.
        place = positions if self._reach is None else positions.clamp(max=self._reach - 1)
        with running(window.recurrent) if self.recurrent else nullcontext():
            output = self.model(
                input_ids=ids,
                position_ids=place,
                attention_mask=masks(self.config, positions, extent, self.dtype, first),
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
