"""Target features of finished rollouts, kept for training the draft head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sample:
    """One rollout: `tokens` [n + 1] int64, `features` [n, F] (fused layers, then the final hidden state), the number
    of prompt tokens, and the version of the policy that computed the features."""

    tokens: Tensor
    features: Tensor
    prompt: int
    version: int


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

    Over the bound the oldest version gives way first, and within a version a random rollout, so that neither short nor
    long completions are preferred. Its random stream is its own.
    """

    def __init__(self, max_tokens: int, max_age: int = MAX_AGE, seed: int = 0):
        self.max_tokens, self.max_age = max_tokens, max_age
        self.version = 0
        self.samples: list[Sample] = []
        self.tokens = 0
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, tokens: Tensor, features: Tensor, prompt: int) -> None:
        if self.max_tokens * features.shape[1] * features.itemsize > HOST_BYTES:
            tokens, features = tokens.cpu(), features.cpu()
        self.samples.append(Sample(tokens, features, prompt, self.version))
        self.tokens += len(features)
        while self.tokens > self.max_tokens:
            oldest = min(sample.version for sample in self.samples)
            candidates = [i for i, sample in enumerate(self.samples) if sample.version == oldest]
            self._drop(candidates[int(torch.randint(len(candidates), (), generator=self.generator))])

    def advance(self) -> None:
        """The policy has moved: features of later rollouts belong to the next version."""
        self.version += 1
        for index in reversed(range(len(self.samples))):
            if self.version - self.samples[index].version >= self.max_age:
                self._drop(index)

    def clear(self) -> None:
        """Forget all rollouts."""
        self.samples.clear()
        self.tokens = 0

    def _drop(self, index: int) -> None:
        self.tokens -= len(self.samples.pop(index).features)


def hold_out(samples: list[Sample], generator: torch.Generator) -> tuple[list[Sample], list[Sample]]:
    """Some rollouts of the newest policy, about HELD_OUT_TOKENS, and what may be trained on besides.

    Rollouts of one prompt are much alike, so whole groups are held out and the rest of a large one is left aside; with
    fewer than four prompts, single rollouts, but never more than a quarter.
    """
    newest = max((sample.version for sample in samples), default=0)
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        if sample.version == newest:
            groups.setdefault(tuple(sample.tokens[: sample.prompt].tolist()), []).append(index)
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
