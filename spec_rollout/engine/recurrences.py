"""The recurrences of transformers' hybrid models, told where a row's tokens begin and end.

A model's layers call them by a name in their own module. While a rollout runs, that name leads here; from here the
model's own kernel is called, on the slot's state and with the tokens that do not count masked so that they leave it as
it is. A call from outside a pass of the rollout goes straight to the kernel.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor, nn

from spec_rollout.engine.delta_rule import GuessedTokens
from spec_rollout.engine.recurrent import RecurrentPass

CURRENT: ContextVar[RecurrentPass | None] = ContextVar(
    "the recurrent layers' view of the pass that runs", default=None
)
CLOSED = -1e4
"""A time step's raw value whose softplus is 0 in every floating-point type, beside any bias."""


@contextmanager
def running(view: RecurrentPass) -> Iterator[None]:
    """The recurrences called within belong to the pass `view`."""
    token = CURRENT.set(view)
    try:
        yield
    finally:
        CURRENT.reset(token)


def _delta_rule(chunked: Callable, module: ModuleType, recurrent: str) -> Callable:
    """The (gated, or Kimi's) delta rule: with a log decay of 0 and a step of 0 a token leaves the state as it is. A
    chunk has 64 tokens, so decoding takes other ways."""
    token_by_token = getattr(module, recurrent)

    def rule(query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **options):
        view = CURRENT.get()
        if view is None:
            return chunked(query, key, value, g=g, beta=beta, **options)
        if view.waits:
            normalised = options.get("use_qk_l2norm_in_kernel", False)
            return view.recur(GuessedTokens(query, key, value, g, beta, normalised))
        kernel = token_by_token if view.lengths is None else chunked
        options |= {"output_final_state": True}

        def advance(state: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
            k, v, decay, step = key, value, g, beta
            if valid is not None:  # keys and values too: nothing times NaN is NaN
                k, v, decay, step = (_hidden(x, valid) for x in (key, value, g, beta))
            return kernel(query, k, v, **{**options, "g": decay, "beta": step, "initial_state": state})

        return view.recur(advance)

    return rule


def _mamba2(chunked: Callable, module: ModuleType) -> Callable:
    """Mamba-2's scan: with a time step of 0 a token leaves the state as it is."""

    def scan(hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, chunk_size: int, **options):
        view = CURRENT.get()
        if view is None:
            return chunked(hidden_states, dt, A, B, C, chunk_size=chunk_size, **options)
        options |= {"return_final_states": True}
        size = min(chunk_size, max(16, 1 << (hidden_states.shape[1] - 1).bit_length()))  # what is short is not padded

        def advance(state: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
            x, b, steps = hidden_states, B, {"dt": dt}
            if valid is not None:
                x, b, steps = _hidden(x, valid), _hidden(B, valid), _time_steps(dt, valid, **options)
            given = {**options, "initial_states": state, **steps}
            return chunked(x, given.pop("dt"), A, b, C, chunk_size=size, **given)

        return view.recur(advance)

    return scan


def _hidden(x: Tensor, valid: Tensor) -> Tensor:
    """`x` [N, T, …], 0 where `valid` [N, T] is false."""
    return x.masked_fill(~valid.view(*valid.shape, *[1] * (x.dim() - 2)), 0)


def _time_steps(
    dt: Tensor,
    valid: Tensor,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **options,
) -> dict[str, object]:
    """What the scan takes for its time steps, 0 where `valid` [N, T] is false. A raw value can say so unless the model
    keeps its steps above a limit; then they are worked out here."""
    hidden = ~valid[..., None]
    if dt_softplus and dt_limit[0] <= 0:
        return {"dt": dt.masked_fill(hidden, CLOSED)}
    steps = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    steps = (F.softplus(steps) if dt_softplus else steps).clamp(*dt_limit).masked_fill(hidden, 0)
    return {"dt": steps, "dt_bias": None, "dt_softplus": False, "dt_limit": (0.0, float("inf"))}


SEAMS: dict[str, Callable[[Callable, ModuleType], Callable]] = {
    "torch_chunk_gated_delta_rule": lambda f, module: _delta_rule(f, module, "torch_recurrent_gated_delta_rule"),
    "chunk_kimi_delta_attention": lambda f, module: _delta_rule(f, module, "recurrent_kimi_delta_attention"),
    "mamba2_chunk_scan": _mamba2,
}
"""By the name under which transformers' models call the recurrence."""


class Recurrences:
    """The names in the modules of `model`'s layers that lead to a recurrence."""

    _lock, _honest, _users = threading.Lock(), {}, Counter()

    def __init__(self, model: nn.Module):
        modules = {sys.modules[type(layer).__module__] for layer in model.modules()}
        self.places = [(module, name) for module in modules for name in SEAMS if hasattr(module, name)]

    @property
    def found(self) -> bool:
        return bool(self.places)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The names lead here within, also when several rollouts of one architecture run at a time."""
        with self._lock:
            for module, name in self.places:
                if not self._users[module, name]:
                    kernel = self._honest[module, name] = getattr(module, name)
                    setattr(module, name, SEAMS[name](kernel, module))
                self._users[module, name] += 1
        try:
            yield
        finally:
            with self._lock:
                for module, name in self.places:
                    self._users[module, name] -= 1
                    if not self._users[module, name]:
                        setattr(module, name, self._honest.pop((module, name)))
