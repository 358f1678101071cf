"""What is kept of a slot once its row has left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from spec_rollout.engine.recurrent import Key


@dataclass
class KeptSlot:
    """Copies of what a slot held of its first `tokens` tokens: per attention layer keys and values
    [heads, tokens, head_dim], per recurrent layer the state behind them."""

    tokens: int
    keys: list[Tensor]
    values: list[Tensor]
    convolutions: dict[Key, Tensor] = field(default_factory=dict)
    states: dict[Key, Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        parts = (*self.keys, *self.values, *self.convolutions.values(), *self.states.values())
        return sum(part.nbytes for part in parts)


class Put(NamedTuple):
    """The first `tokens` of `kept` are those of a slot."""

    slot: int
    kept: KeptSlot
    tokens: int
