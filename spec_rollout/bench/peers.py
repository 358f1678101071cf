"""Other samplers of the same policy, by the names that `bench --peers` takes and its figures carry."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, StoppingCriteria

from spec_rollout.bench.workload import Policy
from spec_rollout.gamma import GammaController
from spec_rollout.records import RolloutStats, StepStats

LOOKUP_TOKENS = 4
"""Guesses per step of assisted generation."""
BLOCK = 256
"""Tokens of a block of continuous batching's cache."""


@dataclass(frozen=True)
class Measured:
    """One run of one sampler: tokens drawn, wall seconds, and our own engine's statistics."""

    tokens: int
    seconds: float
    stats: RolloutStats | None = None
    peak_memory_gib: float | None = None
    """Of a sampler in another process; the bench looks at its own."""
    prompt_s: float | None = None
    """Of the seconds, those until each row had its first token, or those that our own engine spent on prompts; None
    where it is not known."""


@dataclass(frozen=True)
class Sampler:
    """A contender: `run(prompts, seed)` samples one completion per prompt, all of them as one batch."""

    engine: str
    gamma: int | None
    run: Callable[[list[list[int]], int], Measured]
    verification: str | None = None
    controller: GammaController | None = field(default=None, compare=False)
    first: list[StepStats] = field(default_factory=list, compare=False)
    """Steps of the first rollout that `controller` saw."""


class FirstToken(StoppingCriteria):
    """Stops nothing, and notes when every row had its first token: `at`, of `time.perf_counter`."""

    at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        if self.at is None:
            if input_ids.is_cuda:
                torch.cuda.synchronize()
            self.at = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def transformers(policy: Policy, batch_size: int) -> Sampler:
    """`transformers.generate` on left-padded prompts, as TRL calls it."""
    return Sampler("transformers", None, _generating(policy, _config(policy, disable_compile=True)))


def transformers_cb(policy: Policy, batch_size: int) -> Sampler:
    """Continuous batching, `transformers.generate_batch`, its cache sized for the batch: by default it would take
    most of the memory there is, in each call."""
    config = _config(policy)

    def run(prompts: list[list[int]], seed: int) -> Measured:
        torch.manual_seed(seed)
        longest = max(map(len, prompts)) + policy.params.max_new_tokens
        room = ContinuousBatchingConfig(
            block_size=BLOCK,
            num_blocks=batch_size * (-(-longest // BLOCK) + 1),
            max_batch_tokens=max(BLOCK, batch_size * max(map(len, prompts))),
        )
        began = time.perf_counter()
        output = policy.model.generate_batch(
            inputs=prompts, generation_config=config, continuous_batching_config=room, warmup=False
        )
        tokens = sum(len(one.generated_tokens) for one in output.values())
        return Measured(tokens, time.perf_counter() - began)

    return Sampler("transformers_cb", None, run)


def assisted(policy: Policy, batch_size: int) -> Sampler | None:
    """Assisted generation by prompt lookup, which needs no second model; transformers has it for single rows only."""
    if batch_size > 1:
        return None
    config = _config(policy, prompt_lookup_num_tokens=LOOKUP_TOKENS)
    return Sampler("assisted", LOOKUP_TOKENS, _generating(policy, config))


PEERS: dict[str, Callable[[Policy, int], Sampler | None]] = {
    peer.__name__: peer for peer in (transformers, transformers_cb, assisted)
}
"""Each makes a sampler for batches of a size; None where it has none for that size."""


def peers_of(policy: Policy, batch_size: int, names: list[str]) -> list[Sampler]:
    """The samplers of these names, less those that have none for batches of that size."""
    found = {name: PEERS[name](policy, batch_size) for name in names}
    for name in [name for name, sampler in found.items() if sampler is None]:
        print(f"{name} does not decode {batch_size} rows at once and is left out there.", file=sys.stderr)
    return [sampler for sampler in found.values() if sampler is not None]


def _config(policy: Policy, **options) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=policy.params.max_new_tokens,
        do_sample=True,
        # Without any, an id that no token has: `generate` would take those of the policy in place of None.
        eos_token_id=list(policy.params.eos_token_ids) or [policy.model.config.get_text_config().vocab_size],
        pad_token_id=_pad(policy),
        **options,
    )


def _pad(policy: Policy) -> int:
    pad = policy.tokenizer.pad_token_id
    return next(iter(policy.params.eos_token_ids), 0) if pad is None else pad


def _generating(policy: Policy, config: GenerationConfig) -> Callable[[list[list[int]], int], Measured]:
    pad, device = _pad(policy), policy.model.device

    def run(prompts: list[list[int]], seed: int) -> Measured:
        torch.manual_seed(seed)
        began = time.perf_counter()
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        first = FirstToken()
        with torch.no_grad():
            output = policy.model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=[first]
            )
        seconds = time.perf_counter() - began
        return Measured(_count(policy, output[:, width:]), seconds, prompt_s=first.at - began)

    return run


def _count(policy: Policy, new: Tensor) -> int:
    """Tokens up to and including each row's first EOS."""
    ended = torch.isin(new, torch.tensor(policy.params.eos_token_ids, device=new.device)).long()
    return int((ended.cumsum(1) - ended == 0).sum())
