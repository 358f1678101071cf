"""Whether a policy's decode passes are lean ones."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from spec_rollout.engine.compiled import NotCompilableError
from spec_rollout.engine.lean.agreement import Forward, disagreement
from spec_rollout.engine.lean.compiled_pass import CompiledPass, halves_of_model
from spec_rollout.engine.lean.graphs import GraphedPass, recorder
from spec_rollout.engine.lean.lean_pass import LeanPass
from spec_rollout.engine.lean.products import tokens_as_columns
from spec_rollout.engine.lean.programs import PROGRAMS, CannotCompileError
from spec_rollout.engine.lean.recognition import family_of
from spec_rollout.engine.lean.weights import Family
from spec_rollout.engine.probe import narrow_windows

DecodePass = LeanPass | GraphedPass


class LeanChoice:
    """Makes the lean pass of each rollout, where it was shown to compute what the policy's own forward computes."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._failed = False
        self._proven: dict[tuple, bool] = {}
        """By what the outcome depends on: the family, how the policy computes, and whether it is compiled."""

    def make(self, own: Forward, vocab_size: int, kind: tuple[torch.dtype, torch.device]) -> DecodePass | None:
        """The lean pass on the weights of now; None where the policy's `own` pass has to run. `kind` is the dtype and
        device of keys and values."""
        family = self._family(kind)
        if family is None:
            return None
        columns = tokens_as_columns(torch.empty(0, dtype=kind[0], device=kind[1]))
        return self._proven_pass((family, *kind, columns), LeanPass, own, vocab_size)

    def make_compiled(
        self,
        own: Forward,
        vocab_size: int,
        kind: tuple[torch.dtype, torch.device],
        folder: str | None,
        wait: bool = True,
        begin: bool = True,
    ) -> DecodePass | None:
        """The same, recorded where the device can; else with compiled halves of layers, which are kept in `folder`
        (see `Programs.get`). None also where they are not there yet, or the policy has layers that are not compiled.

        Raises:
            NotCompilableError: torch or the C++ compiler that it runs fails.
        """
        family, records = self._family(kind), recorder(kind[1])
        if family is not None and records is not None:

            def recorded(model: nn.Module, family: Family) -> GraphedPass:
                return GraphedPass(LeanPass(model, family, columns=False), records, strict=wait)

            return self._proven_pass((family, *kind, "recorded"), recorded, own, vocab_size)
        halves = None if family is None else halves_of_model(self.model, family, LeanPass(self.model, family))
        if halves is None:
            return None
        forms = {half.form for pair in halves for half in pair}
        try:
            programs = PROGRAMS.get(forms, folder, wait, begin)
        except CannotCompileError as error:
            raise NotCompilableError.of(type(self.model).__name__, str(error)) from error
        if programs is None:
            return None

        def compiled(model: nn.Module, family: Family) -> CompiledPass:
            return CompiledPass(model, family, programs)

        return self._proven_pass((family, *kind, frozenset(forms)), compiled, own, vocab_size)

    def make_compiled_by_now(
        self,
        own: Forward,
        vocab_size: int,
        kind: tuple[torch.dtype, torch.device],
        folder: str | None,
        begin: bool,
    ) -> DecodePass | None:
        """The same without a wait, and what fails is told once and not tried again."""
        if self._failed:
            return None
        try:
            return self.make_compiled(own, vocab_size, kind, folder, wait=False, begin=begin)
        except NotCompilableError as error:
            self._failed = True
            warnings.warn(f"{error} With 'auto' it is decoded without from here on.", RuntimeWarning, stacklevel=2)
            return None

    def _family(self, kind: tuple[torch.dtype, torch.device]) -> Family | None:
        if torch.is_autocast_enabled(kind[1].type):
            return None
        return family_of(self.model)

    def _proven_pass(
        self, key: tuple, make: Callable[[nn.Module, Family], DecodePass], own: Forward, vocab_size: int
    ) -> DecodePass | None:
        family, *kind = key[:3]
        if key not in self._proven:
            with narrow_windows(self.model):
                off = self._disagreement(own, make(self.model, family), vocab_size, tuple(kind))
            if math.isnan(off):  # the policy's fault, and perhaps not for good
                return None
            self._proven[key] = off <= 1
            if off > 1:
                warnings.warn(
                    f"The {make(self.model, family).path} decode pass differs from {type(self.model).__name__}'s own "
                    f"forward by {off:.3g} times what is allowed; this policy is not decoded through it, and slower.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return make(self.model, family) if self._proven[key] else None

    def _disagreement(
        self, own: Forward, lean: DecodePass, vocab_size: int, kind: tuple[torch.dtype, torch.device]
    ) -> float:
        def lean_forward(cache, slots, ids, positions, extent):
            return lean(cache, ids, positions, extent)

        def whole(ids: Tensor) -> Tensor:
            return self.model(input_ids=ids, use_cache=False).logits

        return disagreement(own, whole, lean_forward, vocab_size, kind)
