"""What the target's samples are drawn from: processed logits and keyed noise."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spec_rollout.engine.gumbel_max import noise_width
from spec_rollout.engine.noise import NoiseWindow
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.transfers import Slots
from spec_rollout.records import SamplingParams


class Processor:
    """What makes of a policy's logits the scores that are sampled from, by `params`."""

    def __init__(self, params: SamplingParams):
        self.params = params
        self.temperature_warper, self.filters = _temperature(params), _filters(params)

    @property
    def temperature(self) -> float:
        """What the draft divides its scores by."""
        return self.params.temperature or 1.0

    def scale(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Logits [..., V] after penalty and temperature: float32, or the logits themselves where neither is set."""
        if seen is None and self.temperature_warper is None:
            return logits
        z = logits.float()
        if seen is not None:
            penalty = self.params.repetition_penalty
            z = torch.where(seen, torch.where(z < 0, z * penalty, z / penalty), z)
        return z if self.temperature_warper is None else self.temperature_warper(None, z)

    def filter(self, z: Tensor) -> Tensor:
        """Scaled logits [..., V] with those that top-k, top-p and min-p throw away at -inf; float32, or z itself where
        none is set."""
        if not self.filters:
            return z
        return self.filters(None, z.float().reshape(-1, z.shape[-1])).view(z.shape)

    def process(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Processed logits [..., V], in transformers' order: penalty, temperature, top-k, top-p, min-p."""
        return self.filter(self.scale(logits, seen))


class Sampler(Processor):
    """Processed logits z, and noise that is a pure function of the request's key and the position: all that a sample
    depends on (`gumbel_max.draw`). Greedy is the same without noise."""

    def __init__(self, params: SamplingParams, rows: Rows, numbers: int | None = None):
        """`numbers` of noise per position; by default what one sample takes."""
        super().__init__(params)
        self.window = None if params.greedy else NoiseWindow(rows, numbers or noise_width(rows.vocab_size))
        self.seen = None
        self._room = torch.empty(0, device=rows.device)
        if params.repetition_penalty != 1:
            self.seen = torch.zeros(rows.slots, rows.vocab_size, dtype=torch.bool, device=rows.device)

    def noise(self, rows: Rows, width: int) -> Tensor | None:
        """Gumbel noise [B, width, N] of the positions that the active rows sample next, N numbers for each; None
        when greedy."""
        return None if self.window is None else self.window.take(rows, width)

    def room(self, z: Tensor) -> Tensor:
        """Memory of the shape of `z`, float32; the same in every step."""
        if self._room.numel() < z.numel():
            self._room = z.new_empty(z.numel(), dtype=torch.float32)
        return self._room[: z.numel()].view(z.shape)

    def admit(self, rows: Rows, first: int, last: int) -> None:
        """New rows sit in the slots first..last-1, with their known tokens seen."""
        if self.window is not None:
            self.window.admit(first, last)
        if self.seen is None:
            return
        for slot in range(first, last):
            self.seen[slot] = False
            self.seen[slot].index_fill_(0, rows.tokens[slot, : int(rows.lengths[slot]) + 1], True)

    def seen_along(self, rows: Rows, inputs: Tensor) -> Tensor | None:
        """Tokens seen [B, T, V] before each sample, when the rows' next inputs are the newest token and the guesses
        `inputs` [B, T]: at position i the guessed prefix up to i counts, not the committed one."""
        if self.seen is None:
            return None
        along = torch.zeros(*inputs.shape, rows.vocab_size, dtype=torch.int8, device=rows.device)
        along.scatter_(2, inputs[..., None], 1)
        return (along.cumsum(1, dtype=torch.int8) > 0) | self.seen[: rows.count, None]

    def commit(self, rows: Rows, samples: Tensor, emitted: Tensor) -> None:
        """Note the emitted prefix of `samples` [B, T] as seen."""
        if self.seen is None:
            return
        kept = torch.arange(samples.shape[1], device=rows.device) < emitted[:, None]
        self.seen[: rows.count].scatter_(1, torch.where(kept, samples, samples[:, :1]), True)

    def copy(self, source: Slots, target: Slots) -> None:
        if self.window is not None:
            self.window.copy(source, target)
        if self.seen is not None:
            self.seen[target.device] = self.seen[source.device]


def _temperature(params: SamplingParams) -> TemperatureLogitsWarper | None:
    plain = params.greedy or params.temperature == 1
    return None if plain else TemperatureLogitsWarper(float(params.temperature))


def _filters(params: SamplingParams) -> LogitsProcessorList:
    if params.greedy:
        return LogitsProcessorList()
    wanted = (
        (params.top_k > 0, lambda: TopKLogitsWarper(params.top_k)),
        (params.top_p < 1, lambda: TopPLogitsWarper(params.top_p)),
        (params.min_p > 0, lambda: MinPLogitsWarper(params.min_p)),
    )
    return LogitsProcessorList([make() for condition, make in wanted if condition])
