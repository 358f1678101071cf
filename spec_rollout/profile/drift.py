"""GRPO that moves the policy far, and how well draft heads of different upbringing follow it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from spec_rollout.config import SpecConfig
from spec_rollout.draft.learner import DraftLearner
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.profile import arithmetic_run
from spec_rollout.profile.pictures import draw_drift
from spec_rollout.profile.probe import GAMMA, Probe
from spec_rollout.profile.workload import Policy, hardware, load_policy, positive, table, write_json
from spec_rollout.training import SpecGRPOTrainer


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


class Observer(arithmetic_run.Progress):
    """Probes every `every` steps, and adds up where the time of the run went."""

    def __init__(self, policy: Policy, every: int, seed: int):
        super().__init__("GRPO")
        self.policy, self.every, self.seed = policy, every, seed
        self.trainer: DriftTrainer | None = None
        self.refresh_seconds = self.step_seconds = 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.probe = Probe(self.policy._replace(model=model), self.seed)
        self.frozen = self.probe.ceiling()
        super().on_train_begin(args, state, control)

    def on_step_begin(self, args, state, control, **kwargs):
        self.began, self.trainer.beside = time.perf_counter(), 0.0

    def on_step_end(self, args, state, control, **kwargs):
        self.step_seconds += time.perf_counter() - self.began - self.trainer.beside
        if state.global_step % self.every == 0 or state.global_step == 5:
            began = time.perf_counter()
            self._look(state.global_step)
            self.trainer.leave_out(time.perf_counter() - began)

    def step_logged(self, logs: dict[str, Any]) -> None:
        drift = self.trainer.drift
        drift.reward.append(logs["reward"])
        drift.acceptance_length.append(logs["speculative/mean_acceptance_length"])
        self.refresh_seconds += logs["speculative/refresh_seconds"]

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control)
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
            drift.accuracy.append(arithmetic_run.accuracy(self.policy, drawn, self.seed))
        drift.steps.append(step)
        model.train(training)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    transformers_logging.set_verbosity_error()
    drift = run(args)
    figures = asdict(drift) | {
        "hardware": hardware(),
        "setup": {"gamma": GAMMA, "batch_size": arithmetic_run.BATCH_SIZE, "learning_rate": args.learning_rate},
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
    policy = load_policy(args.policy, "float32", arithmetic_run.COMPLETION_TOKENS)
    observer = Observer(policy, args.every, args.seed)
    trainer = arithmetic_run.make_trainer(
        DriftTrainer,
        args.policy,
        args.out / "run",
        observer,
        steps=args.steps,
        learning_rate=args.learning_rate,
        seed=args.seed,
        draft_ngrams=False,
    )
    trainer.drift, observer.trainer = Drift(), trainer
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
