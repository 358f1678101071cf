"""GRPO that moves the policy far, and how well draft heads of different upbringing follow it."""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from spec_rollout.config import SpecConfig
from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.features import FeatureBuffer
from spec_rollout.draft.learner import DraftLearner
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.refresh import DraftTrainer
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.gamma import FixedGamma
from spec_rollout.profile.pictures import draw_drift
from spec_rollout.profile.workload import (
    Policy,
    arithmetic_prompts,
    hardware,
    load_policy,
    positive,
    table,
    write_json,
)
from spec_rollout.records import Completion
from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer
from spec_rollout.training.arithmetic import accuracy_reward, problems, prompt_dataset

GAMMA = 3
BATCH_SIZE, COMPLETION_TOKENS = 48, 320
PROBE_PROMPTS = 64
CEILING_PROMPTS, CEILING_STEPS = 256, 300
"""Rollouts of the current policy and optimiser steps on them, after which a head no longer improves on unseen ones."""


@dataclass
class Drift:
    """Mean acceptance length at γ = GAMMA on the same held-out prompts, for each probed step."""

    steps: list[int] = field(default_factory=list)
    frozen: list[float] = field(default_factory=list)
    refreshed: list[float] = field(default_factory=list)
    double: list[float] = field(default_factory=list)
    ceiling: list[float] = field(default_factory=list)
    policy_kl: list[float] = field(default_factory=list)
    """Mean over sampled tokens of log π(token) − log π₀(token), in nats; π₀ is the policy before training."""
    accuracy: list[float] = field(default_factory=list)
    """Share of the probe's prompts that the policy gets right."""
    reward: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    """Of every step's rollout."""
    acceptance_length: list[float] = field(default_factory=list)
    """Of every step's rollout, at the numbers of guesses that the controller chose."""
    refresh_time_share: float = 0.0
    """Draft training's share of the time of all steps, the first one's included."""


class Probe:
    """Measures heads on the policy as it is now; its rollouts reach neither training nor the random streams."""

    def __init__(self, policy: Policy, seed: int):
        self.policy, self.seed = policy, seed
        self.prompts = arithmetic_prompts(policy.tokenizer, PROBE_PROMPTS, seed)
        self.first = copy.deepcopy(policy.model.state_dict())

    def acceptance_length(self, head: EagleHead) -> tuple[float, list[Completion]]:
        """Of `head` (float32, still scaled) guessing GAMMA tokens, and what was drawn."""
        running = EagleHead(head.config).to(self.policy.model.device)
        running.load_state_dict(head.folded())
        drafter = EagleDrafter(running, PolicyView(self.policy.model))
        drafter.ready = True
        config = SpecConfig(num_speculative_tokens=GAMMA)
        engine = RolloutEngine(self.policy.model, config, drafter=drafter, controller=FixedGamma(GAMMA))
        drawn = engine.generate(self.prompts, self.policy.params, seed=(self.seed,))
        return engine.stats.mean_acceptance_length, drawn

    def ceiling(self) -> EagleHead:
        """A head trained from new weights on the current policy until it no longer improves."""
        view = PolicyView(self.policy.model)
        device = self.policy.model.device
        head = EagleHead(HeadConfig.for_target(view.config), self.seed).to(device)
        buffer = FeatureBuffer(10**9)
        drafter = EagleDrafter(EagleHead(head.config).to(device), view, buffer)
        engine = RolloutEngine(self.policy.model, SpecConfig(), drafter=drafter, controller=FixedGamma(0))
        prompts = arithmetic_prompts(self.policy.tokenizer, CEILING_PROMPTS, self.seed + 1)
        engine.generate(prompts, self.policy.params, seed=(self.seed, 1))
        head.fit_scale(torch.cat([s.features for s in buffer.samples[:16]]), fresh=True)
        trainer = DraftTrainer(head, view, seed=self.seed)
        batches = (batch for _ in iter(int, 1) for batch in trainer._batches(buffer.samples))
        rates = trainer.rates
        for step in tqdm(range(CEILING_STEPS), desc="ceiling", unit="step", file=sys.stderr, leave=False):
            trainer.rates = tuple(rate * min(1.0, 2 * (1 - step / CEILING_STEPS)) for rate in rates)
            trainer._step(next(batches))
        return head

    def accuracy(self, drawn: Sequence[Completion]) -> float:
        """Share of the prompts that were answered right."""
        texts = [self.policy.tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in drawn]
        answers = [p.answer for p in problems("heldout", PROBE_PROMPTS, self.seed)]
        return statistics.mean(accuracy_reward(texts, answers))

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


class DriftTrainer(SpecGRPOTrainer):
    """Beside its own draft, a second learner with twice the budget trains on the same rollouts."""

    drift: Drift
    beside: float = 0.0
    """Seconds of this step that only the experiment takes."""
    double: DraftLearner | None = None

    def _generate(self, prompts: list):
        began = time.perf_counter()
        output = super()._generate(prompts)
        seconds = time.perf_counter() - began
        self.drift.tokens_per_second.append(sum(map(len, output[1])) / seconds)
        began = time.perf_counter()
        self._train_double()
        self.leave_out(time.perf_counter() - began)
        return output

    def _train_double(self) -> None:
        backend = self.sampler.backend
        own = backend.learner
        if self.double is None:
            config = SpecConfig(draft_overhead=2 * own.config.draft_overhead)
            self.double = DraftLearner(PolicyView(self.model), config, own.device, own.seed)
        self.double.buffer.samples = list(own.buffer.samples)
        self.double.buffer.tokens, self.double.buffer.version = own.buffer.tokens, own.buffer.version - 1
        budget = self.double.budget
        budget.elapsed, budget.step_seconds = own.budget.elapsed, own.budget.step_seconds
        with torch.random.fork_rng(devices=[]):
            self.double.refresh(remaining=self.state.max_steps - self.state.global_step - 1)

    def leave_out(self, seconds: float) -> None:
        """Seconds that no training run would have had: they earn the draft nothing and count in no share."""
        self.beside += seconds
        self.sampler.backend._step_began += seconds


class Observer(TrainerCallback):
    """Probes every `every` steps, and adds up where the time of the run went."""

    def __init__(self, policy: Policy, every: int, seed: int):
        self.policy, self.every, self.seed = policy, every, seed
        self.trainer: DriftTrainer | None = None
        self.refresh_seconds = self.step_seconds = 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.probe = Probe(self.policy._replace(model=model), self.seed)
        self.frozen = self.probe.ceiling()
        self.bar = tqdm(total=state.max_steps, desc="GRPO", unit="step", file=sys.stderr)

    def on_step_begin(self, args, state, control, **kwargs):
        self.began, self.trainer.beside = time.perf_counter(), 0.0

    def on_step_end(self, args, state, control, **kwargs):
        self.step_seconds += time.perf_counter() - self.began - self.trainer.beside
        if state.global_step % self.every == 0 or state.global_step == 5:
            began = time.perf_counter()
            self._look(state.global_step)
            self.trainer.leave_out(time.perf_counter() - began)

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs):
        if logs and "reward" in logs:
            drift = self.trainer.drift
            drift.reward.append(logs["reward"])
            drift.acceptance_length.append(logs["speculative/mean_acceptance_length"])
            self.refresh_seconds += logs["speculative/refresh_seconds"]
            self.bar.set_postfix(reward=f"{logs['reward']:.2f}")
            self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
        self.trainer.drift.refresh_time_share = self.refresh_seconds / self.step_seconds

    def _look(self, step: int) -> None:
        drift, model = self.trainer.drift, self.probe.policy.model
        training = model.training
        with torch.random.fork_rng(devices=[]):
            ceiling = self.probe.ceiling()
            heads = (ceiling, self.frozen, self.trainer.sampler.backend.learner.head, self.trainer.double.head)
            for series, head in zip((drift.ceiling, drift.frozen, drift.refreshed, drift.double), heads, strict=True):
                length, drawn = self.probe.acceptance_length(head)
                series.append(length)
            drift.policy_kl.append(self.probe.policy_kl(drawn))
            drift.accuracy.append(self.probe.accuracy(drawn))
        drift.steps.append(step)
        model.train(training)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    transformers_logging.set_verbosity_error()
    drift = run(args)
    figures = asdict(drift) | {
        "hardware": hardware(),
        "setup": {"gamma": GAMMA, "batch_size": BATCH_SIZE, "learning_rate": args.learning_rate},
    }
    write_json(args.json or args.out / "drift.json", figures)
    draw_drift(args.out / "drift.png", drift)
    table(
        ("step", "frozen", "refreshed", "double budget", "ceiling", "refreshed / ceiling", "KL", "right"),
        list(
            zip(
                drift.steps,
                drift.frozen,
                drift.refreshed,
                drift.double,
                drift.ceiling,
                [a / b for a, b in zip(drift.refreshed, drift.ceiling, strict=True)],
                drift.policy_kl,
                drift.accuracy,
                strict=True,
            )
        ),
    )
    print(f"Draft training took {drift.refresh_time_share:.1%} of the steps' time. Picture: {args.out / 'drift.png'}")
    return 0


def run(args: argparse.Namespace) -> Drift:
    """One GRPO run with probes."""
    observer = Observer(load_policy(args.policy, "float32", COMPLETION_TOKENS), args.every, args.seed)
    config = SpecGRPOConfig(
        output_dir=str(args.out / "run"),
        max_steps=args.steps,
        seed=args.seed,
        per_device_train_batch_size=BATCH_SIZE,
        num_generations=8,
        max_completion_length=COMPLETION_TOKENS,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        beta=0.0,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DriftTrainer(
        model=args.policy,
        reward_funcs=accuracy_reward,
        args=config,
        train_dataset=prompt_dataset("rl", 2000, args.seed),
        callbacks=[observer],
    )
    trainer.drift, observer.trainer = Drift(), trainer
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.train()
    return trainer.drift


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", required=True, help="folder of the reference policy")
    parser.add_argument("--out", type=Path, default=Path("drift"), metavar="DIR")
    parser.add_argument("--steps", type=positive, default=100, metavar="N", help="GRPO steps")
    parser.add_argument("--every", type=positive, default=25, metavar="N", help="steps between two probes")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here; DIR/drift.json otherwise")
    return parser
