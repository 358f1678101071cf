"""What the experiments' training runs leave behind."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from spec_rollout.records import RolloutStats


@dataclass
class Run:
    """What one training run left: per step, the reward, the seconds of sampling and of all, and the tokens drawn."""

    rewards: list[float] = field(default_factory=list)
    rollout_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    completions: list[list[list[int]]] = field(default_factory=list)
    stats: list[RolloutStats] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Drift:
    """Mean acceptance length at γ = GAMMA on the same held-out prompts, for each probed step. `frozen`, `refreshed`
    and `double` begin as the ceiling of the first policy, `cold` as any run without a checkpoint."""

    steps: list[int] = field(default_factory=list)
    frozen: list[float] = field(default_factory=list)
    refreshed: list[float] = field(default_factory=list)
    double: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    ceiling: list[float] = field(default_factory=list)
    policy_kl: list[float] = field(default_factory=list)
    """Mean over sampled tokens of log π(token) − log π₀(token), in nats; π₀ is the policy before training."""
    probe_reward: list[float] = field(default_factory=list)
    """Mean reward on the probe's prompts."""
    reward: list[float] = field(default_factory=list)
    """Of every step, as the next ones."""
    refresh_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    acceptance_length: list[float] = field(default_factory=list)
    """At the numbers of guesses that the controller chose."""
    refresh_time_share: float = 0.0
    """Draft training's share of the time of all steps, the first one's included."""
