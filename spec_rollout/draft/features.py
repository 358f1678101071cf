"""Target features of rollouts, a sample of them, kept for training the draft head."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from spec_rollout.draft.spans import spans
from spec_rollout.engine.transfers import download


@dataclass
class Sample:
    """A span of a rollout: `tokens` [n + 1] int64, `features` [n, F] (fused layers, then the final hidden state), the
    number of prompt tokens of the rollout, the version of the policy that computed the features, the place of the
    first token in the rollout, by which chance it was kept, and a number that rollouts of the same prompt share."""

    tokens: Tensor
    features: Tensor
    prompt: int
    version: int
    first: int = 0
    rank: float = 0.0
    group: int | None = None


@dataclass
class OpenSpan:
    """A sampled span of a rollout that is still running: its number in the rollout, its rank, its first place, the one
    before which all of it is in `parts` [·, F], and the sum of their lengths."""

    number: int
    rank: float
    first: int
    copied: int
    parts: list[Tensor] = field(default_factory=list)
    size: int = 0


MAX_AGE = 8
"""Policy versions after which features are dropped. A policy moves little in so few updates, and old rollouts keep a
young head from learning the newest prompts by heart."""
HOST_BYTES = 2**29
"""A buffer that may grow beyond this is kept in host memory."""
MEASURED_SAMPLES, MEASURED_TOKENS = 16, 4096
"""Rollouts, and tokens of them, that tell a head the magnitude of the features before its first training step."""
HELD_OUT_TOKENS = 512
"""About so many of the freshest rollouts are kept from training, to see acceptance on what the head has not seen."""


class FeatureBuffer:
    """At most `max_tokens` tokens of rollouts, none of them older than `max_age` policy versions.

    Rollouts are cut into spans (`spans`), and each has a rank, drawn uniformly from [0, 1) by its own number. Over the
    bound the oldest version gives way first, and within a version the highest rank, whose place no span of a higher
    one takes. So what is left of a version are the spans of the lowest ranks,

        span i is kept  ⟺  Σ tokens of the spans j with rank j ≤ rank i  ≤  what the version may have,

    whichever ended first, whether they are of short or long rollouts, early or late in them: each is kept with the
    same chance, about `max_tokens` over the tokens of all, but for its own length's share of `max_tokens`.

    Attributes:
        open: by the number of its row, the sampled span of each rollout that is still running.
    """

    def __init__(self, max_tokens: int, max_age: int = MAX_AGE, seed: int = 0):
        self.max_tokens, self.max_age, self.seed = max_tokens, max_age, abs(seed)
        self.version = 0
        self.samples: list[Sample] = []
        self.tokens = 0
        self.open: dict[int, OpenSpan] = {}
        self._lowest = 1.0
        """Of the ranks of this version's spans that have given way."""
        self._calls = 0

    @property
    def nbytes(self) -> int:
        """Of all features that are kept."""
        open_parts = (part for span in self.open.values() for part in span.parts)
        return sum(x.nbytes for x in (*(s.features for s in self.samples), *open_parts))

    def begin(self) -> None:
        """Rollouts begin, whose rows are numbered anew."""
        self.give_up()
        self._calls += 1

    def give_up(self) -> None:
        """Forget what is open."""
        for row in list(self.open):
            self.drop(row)

    def start(self, row: int, number: int, place: int) -> OpenSpan | None:
        """Rollout `row` comes to its span `number`, of which this is the first `place` to be given; None if the span
        is not sampled."""
        rank = np.random.default_rng((self.seed, self._calls, row, number)).random()
        if rank >= self._lowest:
            return None
        self.open[row] = OpenSpan(number, rank, place, place)
        return self.open[row]

    def extend(self, row: int, features: Tensor) -> None:
        """`features` [n, F] go behind those that the open span of `row` has."""
        span = self.open[row]
        span.parts.append(features)
        span.size += len(features)
        self.tokens += len(features)
        self._make_room()

    def seal(self, row: int, tokens: Tensor, prompt: int, first: int, group: int) -> None:
        """The open span of `row` is complete: from the place `first` on it has `tokens` [n + 1]."""
        span = self.open.pop(row)
        features = torch.cat(span.parts)
        self.samples.append(Sample(tokens, features, prompt, self.version, first, span.rank, group))
        self._store(self.samples[-1])

    def drop(self, row: int) -> None:
        """Forget the open span of `row`."""
        self.tokens -= self.open.pop(row).size

    def add(self, tokens: Tensor, features: Tensor, prompt: int) -> None:
        """A whole rollout: `tokens` [n + 1] int64 and `features` [n, F]; the first `prompt` tokens were given."""
        self.begin()
        group = hash(tuple(tokens[:prompt].tolist()))
        for number, (start, stop) in enumerate(spans(prompt, len(features))):
            if self.start(0, number, start):
                self.extend(0, features[start:stop].clone())
            if 0 in self.open:
                self.seal(0, tokens[start : stop + 1].clone(), prompt, start, group)

    def advance(self) -> None:
        """The policy has moved: features of later rollouts belong to the next version."""
        self.version += 1
        self._lowest = 1.0
        for index in reversed(range(len(self.samples))):
            if self.version - self.samples[index].version >= self.max_age:
                self._drop(index)

    def clear(self) -> None:
        """Forget all rollouts."""
        self.samples.clear()
        self.open.clear()
        self.tokens = 0

    def _make_room(self) -> None:
        while self.tokens > self.max_tokens:
            given: list[tuple[int, float, int, int | None]]
            given = [(-sample.version, sample.rank, index, None) for index, sample in enumerate(self.samples)]
            given += [(-self.version, span.rank, -1, row) for row, span in self.open.items()]
            version, rank, index, row = max(given, key=lambda one: one[:2])
            if version == -self.version:
                self._lowest = rank
            if row is None:
                self._drop(index)
            else:
                self.drop(row)

    def _store(self, sample: Sample) -> None:
        """Where it is to be kept."""
        if self.max_tokens * sample.features.shape[1] * sample.features.itemsize > HOST_BYTES:
            sample.tokens, sample.features = download(sample.tokens), download(sample.features)

    def _drop(self, index: int) -> None:
        self.tokens -= len(self.samples.pop(index).features)


def hold_out(samples: list[Sample], generator: torch.Generator) -> tuple[list[Sample], list[Sample]]:
    """Some rollouts of the newest policy, about HELD_OUT_TOKENS, and what may be trained on besides.

    Rollouts of one prompt are much alike, so whole groups are held out and the rest of a large one is left aside; with
    fewer than four prompts, single rollouts, but never more than a quarter.
    """
    newest = max((sample.version for sample in samples), default=0)
    groups: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        if sample.version == newest:
            prompt = tuple(sample.tokens[: sample.prompt].tolist()) if sample.group is None else ()
            groups.setdefault(hash(prompt) if sample.group is None else sample.group, []).append(index)
    units = list(groups.values()) if len(groups) >= 4 else [[index] for group in groups.values() for index in group]
    held: list[int] = []
    aside: set[int] = set()
    size = 0
    for chosen in torch.randperm(len(units), generator=generator).tolist()[: len(units) // 4]:
        if size >= HELD_OUT_TOKENS:
            break
        aside |= set(units[chosen])
        for index in units[chosen]:
            if size < HELD_OUT_TOKENS:
                held.append(index)
                size += len(samples[index].features)
    return [samples[i] for i in held], [sample for i, sample in enumerate(samples) if i not in aside]


def measured(samples: list[Sample], device: torch.device) -> tuple[Tensor, Tensor]:
    """Features [N, F] at some entries of the first rollouts, to tell their size, and the tokens [N] after them."""
    features = torch.cat([sample.features for sample in samples[:MEASURED_SAMPLES]])
    tokens = torch.cat([sample.tokens[1:] for sample in samples[:MEASURED_SAMPLES]])
    every = -(-len(features) // MEASURED_TOKENS)
    return features[::every].to(device), tokens[::every].to(device)
