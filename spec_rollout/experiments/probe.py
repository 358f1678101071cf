"""What draft heads are worth on a policy as it is now: acceptance on held-out prompts, and the best within reach."""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Sequence
from itertools import chain, repeat

import torch
from tqdm import tqdm

from spec_rollout.bench.workload import Policy, arithmetic_prompts
from spec_rollout.config import SpecConfig
from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.eagle import EagleHead
from spec_rollout.draft.features import FeatureBuffer, measured
from spec_rollout.draft.inheritance import head_config, inherit
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.refresh import DraftTrainer
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.gamma import FixedGamma
from spec_rollout.records import Completion

GAMMA = 3
PROBE_PROMPTS = 64
CEILING_PROMPTS, CEILING_STEPS = 256, 300
"""Rollouts of the current policy, and optimiser steps on them, that the ceiling's head learns from new weights."""


class Probe:
    """Measures heads on `policy` as it is now; its rollouts reach no training, and `ceiling` only its own."""

    def __init__(self, policy: Policy, seed: int):
        self.policy, self.seed = policy, seed
        self.prompts = arithmetic_prompts(policy.tokenizer, PROBE_PROMPTS, seed)
        self.first = copy.deepcopy(policy.model.state_dict())

    def acceptance_length(self, head: EagleHead, gamma: int = GAMMA) -> tuple[float, list[Completion]]:
        """Of `head` (float32, still scaled) guessing `gamma` tokens, and what was drawn."""
        own = None if head.own_output is None else len(head.own_output)
        running = EagleHead(head.config, own_output=own).to(self.policy.model.device)
        running.load_state_dict(head.folded())
        drafter = EagleDrafter(running, PolicyView(self.policy.model))
        drafter.ready = True
        config = SpecConfig(num_speculative_tokens=gamma)
        engine = RolloutEngine(self.policy.model, config, drafter=drafter, controller=FixedGamma(gamma))
        drawn = engine.generate(self.prompts, self.policy.params, seed=(self.seed,))
        return engine.stats.mean_acceptance_length, drawn

    def ceiling(self) -> EagleHead:
        """A head trained from new weights for CEILING_STEPS on CEILING_PROMPTS rollouts of the current policy."""
        view = PolicyView(self.policy.model)
        device = self.policy.model.device
        head = EagleHead(head_config(view.model), self.seed).to(device)
        buffer = FeatureBuffer(10**9)
        drafter = EagleDrafter(EagleHead(head.config).to(device), view, buffer)
        engine = RolloutEngine(self.policy.model, SpecConfig(), drafter=drafter, controller=FixedGamma(0))
        prompts = arithmetic_prompts(self.policy.tokenizer, CEILING_PROMPTS, self.seed + 1)
        engine.generate(prompts, self.policy.params, seed=(self.seed, 1))
        features, tokens = measured(buffer.samples, device)
        head.fit_scale(features, fresh=True)
        inherit(head, view, features, tokens)
        trainer = DraftTrainer(head, view, seed=self.seed)
        batches = chain.from_iterable(trainer.batches(samples) for samples in repeat(buffer.samples))
        rates = trainer.rates
        for step in tqdm(range(CEILING_STEPS), desc="ceiling", unit="step", file=sys.stderr, leave=False):
            trainer.rates = tuple(rate * min(1.0, 2 * (1 - step / CEILING_STEPS)) for rate in rates)
            trainer.step(next(batches))
        return head

    @torch.no_grad()
    def policy_kl(self, drawn: Sequence[Completion]) -> float:
        """Mean of log π − log π₀ over the tokens `drawn` from the current policy π at T = 1."""
        model = self.policy.model
        now = copy.deepcopy(model.state_dict())
        model.load_state_dict(self.first)
        differences = []
        for prompt, completion in zip(self.prompts, drawn, strict=True):
            ids = torch.tensor([*prompt, *completion.token_ids], device=model.device)
            log_probs = model(ids[None, :-1]).logits[0, len(prompt) - 1 :].log_softmax(-1)
            old = log_probs.gather(1, ids[len(prompt) :, None])[:, 0].cpu()
            differences += (torch.tensor(completion.logprobs) - old).tolist()
        model.load_state_dict(now)
        return statistics.mean(differences)
