"""Which attention decodes a policy: one that takes masks, and computes what the policy's own does."""

from __future__ import annotations

from torch import nn

from spec_rollout.engine.attention import GROUPED_SDPA, takes_grouped_sdpa
from spec_rollout.engine.precision import broken_policy
from spec_rollout.engine.probe import STRIDES, Probe, narrow_windows, prove
from spec_rollout.records import UnsupportedModelError


def first_proven(target, configs: list, own: list[str]) -> list[str]:
    """The attention for each of `configs` under which `target` decodes what the policy reads with its `own`: the first
    that is proven of those that it may take.

    Raises:
        UnsupportedModelError: none is.
    """
    failure = None
    with narrow_windows(target.model):
        expected = [Probe(target, stride).expected() for stride in STRIDES]
        if not all(bool(logits.logsumexp(-1).isfinite().all()) for logits in expected):
            raise broken_policy(target.model, "in a pass over a few tokens before the rollout")
        for wanted in (GROUPED_SDPA, "sdpa", "eager"):
            taken = [_replacement(target.model, implementation, wanted) for implementation in own]
            if None in taken:
                continue
            attend(configs, taken)
            try:
                prove(target, expected)
                return taken
            except UnsupportedModelError as error:
                failure = failure or error
    raise failure


def _replacement(model: nn.Module, own: str, wanted: str) -> str | None:
    """What takes the place of the implementation `own` where `wanted` is tried; None if that cannot be."""
    if own == "eager":
        return own
    if wanted == GROUPED_SDPA and not takes_grouped_sdpa(model):
        return None
    if wanted == "eager":
        return None if own == "sdpa" else wanted
    return wanted if own == wanted or getattr(model, "_supports_sdpa", False) else None


def attend(configs, implementations: list[str]) -> None:
    """Let each of `configs` name its implementation."""
    for config, implementation in zip(configs, implementations, strict=True):
        config._attn_implementation = implementation
