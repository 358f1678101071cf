"""The requests of vLLM's batch, in its order: the noise key of each, where it stands, and how it is to be sampled."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spec_rollout.engine.gumbel_max import noise_width
from spec_rollout.engine.noise import NoiseWindow, request_keys
from spec_rollout.engine.sampling import Processor
from spec_rollout.engine.transfers import on_both_sides
from spec_rollout.records import SamplingParams

KEYS, MIN_P = "spec_rollout_keys", "spec_rollout_min_p"
"""Entries of a request's `extra_args`: the noise keys of the prompts that were sent with it, two integers for each,
and min-p, which vLLM itself refuses beside guesses."""
STEPS = 8
"""Positions for which noise is looked up at once while nothing is guessed, and all rows go on by one."""
PLACE = re.compile(r"-(\d+)(?:-[0-9a-f]{8})?$")
"""End of the id that vLLM's server gives to each prompt of a request: which one it is, and vLLM's own random part."""


def keyed(keys: Sequence[tuple[int, int]], min_p: float) -> dict[str, Any]:
    """The `extra_args` of a request of one prompt per key."""
    return {KEYS: [word for key in keys for word in key], MIN_P: min_p}


class KeyedBatch:
    """Reads as `Rows` for a `NoiseWindow`: row b is the b-th request of vLLM's batch.

    Attributes:
        groups: for each way to sample that occurs, its rows [N]; None where all rows share one.
        temperature: what the draft divides its scores by, [B, 1] float32; None where that is 1 for all.
        greedy: rows without noise, [B] bool; None where there are none, or no others.
        plain: whether no request asks for a penalty, or for anything else that vLLM applies before the temperature.
    """

    def __init__(self, slots: int, device: torch.device):
        self.slots, self.device = slots, device
        self.count = 0
        self.lengths = np.zeros(slots, dtype=np.int64)
        self.starts = np.zeros(slots, dtype=np.int64)
        self.key = torch.zeros(slots, 2, dtype=torch.int32, device=device)
        self.window: NoiseWindow | None = None
        self.groups: list[tuple[Processor, Tensor | None]] = []
        self.temperature: Tensor | None = None
        self.greedy: Tensor | None = None
        self.all_greedy = True
        self.plain = True
        self._ids: list[str] = []
        self._taken: Tensor | None = None
        """The noise that was asked for last, for this batch."""
        self._from = np.zeros(0, dtype=np.int64)
        self._processors: dict[str, Processor] = {}

    def follow(self, ids: Sequence[str], requests: Mapping[str, Any]) -> None:
        """The batch now consists of `ids`, in this order; `requests` are vLLM's records of them."""
        if ids == self._ids:
            return
        self._taken = None
        before = {name: row for row, name in enumerate(self._ids)}
        source = on_both_sides([before[name] for name in ids if name in before], self.device)
        target = on_both_sides([row for row, name in enumerate(ids) if name in before], self.device)
        self.key[target.device] = self.key[source.device]
        if self.window is not None:
            self.window.copy(source, target)
        for row, name in enumerate(ids):
            if name not in before:
                self._admit(row, name, requests[name].sampling_params)
        self._ids, self.count = list(ids), len(ids)
        self._processors = {name: self._processors[name] for name in ids}
        self._group([requests[name].sampling_params for name in ids])

    def forget(self) -> None:
        """Rows begin again: what is known of where they stand is not so."""
        self._ids, self._processors = [], {}

    def noise(self, progress: np.ndarray, width: int, vocab_size: int) -> Tensor | None:
        """Noise [B, width, N] of the completion tokens `progress` [B] (below 0: in a prompt) and the next ones; None
        if all are greedy."""
        if self.all_greedy:
            return None
        # The rest of a prompt is sampled from as well, and what comes of it thrown away.
        progress = np.maximum(progress, 0)
        if self._taken is not None:  # often that of what was guessed, or of the step before
            offset = progress - self._from
            begin = int(offset[0])
            if 0 <= begin <= self._taken.shape[1] - width and (offset == begin).all():
                return self._taken[:, begin : begin + width]
        self.lengths[: self.count] = progress - 1
        self.window = self.window or NoiseWindow(self, noise_width(vocab_size))
        self._taken, self._from = self.window.take(self, width if width > 1 else STEPS), progress
        return self._taken[:, :width]

    def progress(self) -> Tensor:
        """Index [B] of the completion token that each row samples next."""
        return torch.from_numpy(self.lengths[: self.count] + 1).to(self.device)

    def _admit(self, row: int, name: str, params: Any) -> None:
        self.key[row] = torch.tensor(request_key(name, params), dtype=torch.int32)
        if self.window is not None:
            self.window.admit(row, row + 1)
        min_p = max(params.min_p, (params.extra_args or {}).get(MIN_P, 0.0))
        wanted = SamplingParams(
            temperature=params.temperature, top_k=max(params.top_k, 0), top_p=params.top_p, min_p=min_p
        )
        alike = (p for p in self._processors.values() if p.params == wanted)
        self._processors[name] = next(alike, None) or Processor(wanted)

    def _group(self, given: list[Any]) -> None:
        rows: dict[int, list[int]] = {}
        found = list(self._processors.values())
        for row, processor in enumerate(found):
            rows.setdefault(id(processor), []).append(row)
        single = len(rows) == 1
        self.groups = [
            (found[places[0]], None if single else torch.tensor(places, device=self.device))
            for places in rows.values()
        ]
        ones = all(p.temperature == 1 for p in found)
        self.temperature = None if ones else torch.tensor([[p.temperature] for p in found], device=self.device)
        greedy = [p.params.greedy for p in found]
        self.all_greedy = all(greedy)
        self.greedy = torch.tensor(greedy, device=self.device) if any(greedy) and not all(greedy) else None
        self.plain = all(map(_plain, given))


def request_key(name: str, params: Any) -> tuple[int, int]:
    """The noise key of the request `name`: what our trainers sent, else one that follows from its seed, else a new
    one, as anybody else's request is drawn by chance."""
    words = (params.extra_args or {}).get(KEYS)
    if words:
        place = PLACE.search(name) if len(words) > 2 else None
        index = 2 * int(place[1]) if place else 0
        return words[index], words[index + 1]
    seed = [params.seed & 0xFFFFFFFF] if params.seed is not None else np.frombuffer(os.urandom(16), np.uint32).tolist()
    return request_keys(seed, 1)[0]


def _plain(params: Any) -> bool:
    return not (
        params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or params.min_tokens
        or params.logit_bias
        or params.allowed_token_ids
        or params.bad_words
    )
