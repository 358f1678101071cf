"""GRPO that moves the policy far, and how well draft heads of different upbringing follow it."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from spec_rollout.bench.workload import Policy, hardware, load_policy, positive, table, write_json
from spec_rollout.config import SpecConfig
from spec_rollout.draft.checkpoint import save_head
from spec_rollout.draft.eagle import EagleHead
from spec_rollout.draft.learner import DraftLearner
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.experiments import arithmetic_run
from spec_rollout.experiments.pictures import draw_drift
from spec_rollout.experiments.probe import CEILING_PROMPTS, CEILING_STEPS, GAMMA, Probe
from spec_rollout.experiments.runs import Drift
from spec_rollout.tasks.arithmetic import worked_sums_reward
from spec_rollout.training import SpecGRPOTrainer

PROBED_EARLY = (1, 5)
"""Steps that are probed besides every nth, since a cold head learns most in them."""


class DriftTrainer(SpecGRPOTrainer):
    """Beside its own draft, further learners train on the same rollouts, each on a time budget of its own."""

    drift: Drift
    beside: float = 0.0
    """Seconds of this step that only the experiment takes."""
    learners: dict[str, DraftLearner]
    """By the name of their series."""

    def _generate(self, prompts: list):
        began = time.perf_counter()
        output = super()._generate(prompts)
        seconds = time.perf_counter() - began
        self.drift.tokens_per_second.append(sum(map(len, output[1])) / seconds)
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            for learner in self.learners.values():
                self._train(learner)
        self.leave_out(time.perf_counter() - began)
        return output

    def _train(self, learner: DraftLearner) -> None:
        own = self.sampler.backend.learner
        learner.buffer.samples = list(own.buffer.samples)
        learner.buffer.tokens, learner.buffer.version = own.buffer.tokens, own.buffer.version - 1
        learner.budget.elapsed, learner.budget.step_seconds = own.budget.elapsed, own.budget.step_seconds
        learner.refresh(remaining=self.state.max_steps - self.state.global_step - 1)

    def leave_out(self, seconds: float) -> None:
        """Seconds that no training run would have had: they earn the draft nothing and count in no share."""
        self.beside += seconds
        self.sampler.backend._step_began += seconds


class Observer(arithmetic_run.Progress):
    """Probes before the first step and every `every` steps, and keeps where the time of the run went."""

    def __init__(self, policy: Policy, every: int, seed: int, first: EagleHead, write: Callable[[Drift], None]):
        super().__init__("GRPO")
        self.policy, self.every, self.seed, self.first, self.write = policy, every, seed, first, write
        self.trainer: DriftTrainer | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.probe = Probe(self.policy._replace(model=model), self.seed)
        super().on_train_begin(args, state, control)

    def on_step_begin(self, args, state, control, **kwargs):
        self.began, self.trainer.beside = time.perf_counter(), 0.0

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.drift.step_seconds.append(time.perf_counter() - self.began - self.trainer.beside)
        if state.global_step % self.every == 0 or state.global_step in (*PROBED_EARLY, state.max_steps):
            began = time.perf_counter()
            self._look(state.global_step)
            self.write(self.trainer.drift)
            self.trainer.leave_out(time.perf_counter() - began)

    def step_logged(self, logs: dict[str, Any]) -> None:
        drift = self.trainer.drift
        drift.reward.append(logs["reward"])
        drift.acceptance_length.append(logs["speculative/mean_acceptance_length"])
        drift.refresh_seconds.append(logs["speculative/refresh_seconds"])
        drift.refresh_time_share = sum(drift.refresh_seconds) / sum(drift.step_seconds)

    def _look(self, step: int) -> None:
        drift, model, learners = self.trainer.drift, self.probe.policy.model, self.trainer.learners
        training = model.training
        with torch.random.fork_rng(devices=[]):
            heads = {"ceiling": self.probe.ceiling(), "frozen": self.first}
            heads |= {"refreshed": self.trainer.sampler.backend.learner.head}
            heads |= {name: learner.head for name, learner in learners.items()}
            for name, head in heads.items():
                length, drawn = self.probe.acceptance_length(head)
                getattr(drift, name).append(length)
            drift.policy_kl.append(self.probe.policy_kl(drawn))
            texts = [self.policy.tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in drawn]
            drift.probe_reward.append(statistics.mean(worked_sums_reward(texts)))
        drift.steps.append(step)
        model.train(training)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    transformers_logging.set_verbosity_error()
    about = {
        "hardware": hardware(),
        "setup": {
            "gamma": GAMMA,
            "batch_size": args.problems * arithmetic_run.GENERATIONS,
            "num_generations": arithmetic_run.GENERATIONS,
            "max_completion_length": args.max_new_tokens,
            "learning_rate": args.learning_rate,
            "reward": worked_sums_reward.__name__,
            "ceiling": {"steps": CEILING_STEPS, "rollouts": CEILING_PROMPTS},
        },
    }

    def write(drift: Drift) -> None:
        write_json(args.json or args.out / "drift.json", asdict(drift) | about)
        draw_drift(args.out / "drift.png", drift)

    drift = run(args, write)
    write(drift)
    ratios = [a / b for a, b in zip(drift.refreshed, drift.ceiling, strict=True)]
    series = (drift.frozen, drift.refreshed, drift.double, drift.cold, drift.ceiling, ratios, drift.policy_kl)
    header = ("step", "frozen", "refreshed", "double budget", "cold", "ceiling", "refreshed / ceiling", "KL", "reward")
    table(header, list(zip(drift.steps, *series, drift.probe_reward, strict=True)))
    print(f"Draft training took {drift.refresh_time_share:.1%} of the steps' time. Picture: {args.out / 'drift.png'}")
    return 0


def run(args: argparse.Namespace, write: Callable[[Drift], None]) -> Drift:
    """One GRPO run with probes; `write` gets what there is after each of them."""
    policy = load_policy(args.policy, "float32", args.max_new_tokens)
    first = Probe(policy, args.seed).ceiling()
    save_head(args.out / "first", first, None, None, {})
    observer = Observer(policy, args.every, args.seed, first, write)
    trainer = arithmetic_run.make_trainer(
        DriftTrainer,
        args.policy,
        args.out / "run",
        observer,
        steps=args.steps,
        learning_rate=args.learning_rate,
        seed=args.seed,
        reward=worked_sums_reward,
        batch_size=args.problems * arithmetic_run.GENERATIONS,
        max_completion_length=args.max_new_tokens,
        draft_ngrams=False,
        num_speculative_tokens=GAMMA,  # so that each draft spends its budget, whatever guesses are worth here
        draft_model_path=str(args.out / "first"),
    )
    overhead = trainer.args.draft_overhead
    view = PolicyView(trainer.model)
    trainer.learners = {
        name: DraftLearner(view, SpecConfig(draft_overhead=share), next(trainer.model.parameters()).device)
        for name, share in (("double", 2 * overhead), ("cold", overhead))
    }
    trainer.learners["double"].load(args.out / "first", resume=False)
    trainer.drift, observer.trainer = Drift(), trainer
    trainer.train()
    return trainer.drift


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", required=True, help="folder of the reference policy")
    parser.add_argument("--out", type=Path, default=Path("drift"), metavar="DIR")
    parser.add_argument("--steps", type=positive, default=100, metavar="N", help="GRPO steps")
    parser.add_argument("--every", type=positive, default=25, metavar="N", help="steps between two probes")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument(
        "--problems",
        type=positive,
        default=16,
        metavar="N",
        help=f"problems of a step, with {arithmetic_run.GENERATIONS} completions each",
    )
    parser.add_argument("--max-new-tokens", type=positive, default=160, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here; DIR/drift.json otherwise")
    return parser
