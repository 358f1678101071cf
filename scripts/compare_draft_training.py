"""For maintainers: ways to train a draft head from nothing, side by side, by acceptance and the time of a step.

python scripts/compare_draft_training.py --policy policies/small --json benchmarks/cpu-small-draft-training.json
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from tqdm import tqdm

from spec_rollout.bench.workload import (
    Policy,
    arithmetic_prompts,
    hardware,
    load_policy,
    positives,
    table,
    write_json,
)
from spec_rollout.draft import inheritance, refresh
from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.features import FeatureBuffer, Sample, measured
from spec_rollout.draft.inheritance import head_config, inherit
from spec_rollout.draft.objective import STEP_DECAY, scores
from spec_rollout.draft.packing import Pack
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.refresh import DraftTrainer
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.experiments.probe import GAMMA, Probe
from spec_rollout.gamma import FixedGamma

PROMPTS, MAX_NEW_TOKENS, SEED = 256, 320, 0
FAR = 7
"""Guesses beside GAMMA with which a head is measured."""
NOISE = 0.1
"""Half the width of the uniform noise on features of magnitude 1."""


@dataclass(frozen=True)
class Arm:
    """A way to train: as the package does, but for what is named."""

    name: str
    inherits: bool = True
    donor: Callable[[HeadConfig], int] | None = None
    share: int = refresh.UNROLLED_SHARE
    depth: int = refresh.UNROLLED_STEPS
    single_feature: bool = False
    own_output: bool = False
    trainer: Callable[..., DraftTrainer] = DraftTrainer


class Overlap(DraftTrainer):
    """Trains towards 1 - Σ min(p, q), the total variation: what acceptance at T = 1 is."""

    def loss(self, batch: Pack) -> Tensor:
        losses = [
            1 - torch.minimum(log_q.exp(), target).sum(-1).mean()
            for log_q, target in scores(self.head, self.view, batch, self.depth, self._starts(batch))
        ]
        return sum(loss * STEP_DECAY**j for j, loss in enumerate(losses))


class Noisy(DraftTrainer):
    """Adds uniform noise to the features that the head reads, as EAGLE-1 does."""

    def loss(self, batch: Pack) -> Tensor:
        size = self.head.fc.in_features
        noise = (2 * torch.rand(*batch.tokens.shape, size, generator=self.generator) - 1) * NOISE
        features = batch.features.clone()
        features[..., :size] += noise.to(features.device) / self.head.feature_scale
        return super().loss(batch._replace(features=features))


ARMS = (
    Arm("as built"),
    Arm("the last layer inherited", donor=lambda config: -1),
    Arm("random weights", inherits=False),
    Arm("every start unrolled", share=1),
    Arm("three steps unrolled", depth=refresh.FIRST_UNROLLED_STEPS),
    Arm("the highest feature alone", single_feature=True, donor=lambda config: 2),
    Arm("own output head", own_output=True),
    Arm("total variation", trainer=Overlap),
    Arm("feature noise", trainer=Noisy),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", required=True, help="folder of the reference policy")
    parser.add_argument("--at", type=positives, default=[25, 50, 250], metavar="N,N", help="steps to measure after")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    policy = load_policy(args.policy, "float32", MAX_NEW_TOKENS)
    probe, samples, rows = Probe(policy, SEED), rollouts(policy), []
    for arm in tqdm(ARMS, desc="arms", unit="arm"):
        rows.append({"arm": arm.name, **train(arm, policy, probe, samples, args.at)})
    figures = {"gamma": GAMMA, "gamma_far": FAR, "steps": args.at, "rows": rows, "hardware": hardware()}
    write_json(args.json, figures | {"setup": {"prompts": PROMPTS, "batch_tokens": refresh.BATCH_TOKENS}})
    names = ("acceptance_length", "acceptance_length_far")
    measured_at = [f"γ={gamma}, {steps} steps" for gamma in (GAMMA, FAR) for steps in args.at]
    cells = [(row["arm"], *chain(*(row[name] for name in names)), 1000 * row["seconds_per_step"]) for row in rows]
    table(("trained", *measured_at, "ms / step"), cells)
    return 0


def rollouts(policy: Policy) -> list[Sample]:
    """What the policy draws from PROMPTS prompts, with its features."""
    buffer, view = FeatureBuffer(10**9), PolicyView(policy.model)
    head = EagleHead(head_config(policy.model)).to(policy.model.device)
    engine = RolloutEngine(policy.model, drafter=EagleDrafter(head, view, buffer), controller=FixedGamma(0))
    engine.generate(arithmetic_prompts(policy.tokenizer, PROMPTS, SEED + 1), policy.params, seed=(SEED, 1))
    return buffer.samples


def train(arm: Arm, policy: Policy, probe: Probe, samples: list[Sample], at: list[int]) -> dict:
    """Acceptance lengths of the head on held-out prompts after each of `at` steps, and a step's median seconds."""
    view, vocabulary = PolicyView(policy.model), policy.model.config.vocab_size
    shape = head_config(policy.model) if arm.inherits else HeadConfig.for_target(policy.model.config)
    if arm.single_feature:
        skipped = (len(shape.aux_layers) - 1) * shape.hidden_size
        shape = replace(shape, aux_layers=shape.aux_layers[-1:])
        samples = [replace(sample, features=sample.features[:, skipped:]) for sample in samples]
    head = EagleHead(shape, SEED, vocabulary if arm.own_output else None).to(policy.model.device)
    features, tokens = measured(samples, policy.model.device)
    head.fit_scale(features, fresh=True)
    if arm.inherits:
        with patch.object(inheritance, "donor_index", arm.donor or inheritance.donor_index):
            inherit(head, view, features, tokens)
    trainer = arm.trainer(head, view, seed=SEED)
    refresh.UNROLLED_SHARE, refresh.UNROLLED_STEPS = arm.share, arm.depth
    batches, lengths, seconds = endless(trainer, samples), {GAMMA: [], FAR: []}, []
    for step in range(1, max(at) + 1):
        batch, began = next(batches), time.perf_counter()
        trainer.step(batch)
        seconds.append(time.perf_counter() - began)
        if step in at:
            for gamma, found in lengths.items():
                found.append(probe.acceptance_length(trainer.average, gamma)[0])
    median = sorted(seconds)[len(seconds) // 2]
    return {
        "acceptance_length": lengths[GAMMA],
        "acceptance_length_far": lengths[FAR],
        "seconds_per_step": median,
    }


def endless(trainer: DraftTrainer, samples: list[Sample]) -> Iterator[Pack]:
    while True:
        yield from trainer.batches(samples)


if __name__ == "__main__":
    raise SystemExit(main())
