"""What one of several processes does: a few generations of PPO; writes what it saw.

torchrun --nproc_per_node 2 -m tests.training.ppo.ranks KIND FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from datasets import Dataset

from spec_rollout.training import PPOConfig, PPOTrainer
from tests.training.conftest import OPTIONS, PPO, PROMPTS, Digits
from tests.training.processes import KINDS, join, report

FIGURES = ("kl", "kl_coef", "policy_loss", "explained_variance", "reward", "advantages/std")


def main(kind: str, folder: Path) -> None:
    join(kind)
    chosen = {name: value for name, value in OPTIONS.items() if name != "use_cpu"} | PPO | KINDS[kind]
    chosen |= {"kl_target": 0.05, "kl_horizon": 50, "save_strategy": "steps", "save_steps": 4}
    args = PPOConfig(str(folder / "run"), calibration_cache=str(folder), num_speculative_tokens=2, **chosen)
    trainer = PPOTrainer(str(folder / "policy"), Digits(), args, Dataset.from_dict({"prompt": PROMPTS * 4}))
    whitened: list[tuple[float, float]] = []
    score = trainer._generate_and_score_completions

    def noting(inputs):
        batch = score(inputs)
        whitened.append((batch["advantages"].sum().item(), batch["loss_mask"].sum().item()))
        return batch

    trainer._generate_and_score_completions = noting
    trainer.train()
    figures = {
        "weights": weights(trainer),
        "coef": trainer.kl_controller.coef,
        "log": [{name: row[name] for name in FIGURES if name in row} for row in trainer.state.log_history],
        "seen": trainer.reward_funcs[0].seen,
        "whitened": whitened,
        "kind": [trainer._dist.zero_stage, trainer.accelerator.num_processes],
    }
    report(folder, figures)


def weights(trainer: PPOTrainer) -> dict[str, float]:
    """The sum of each parameter."""
    with trainer._dist.gather_params(list(trainer.model.parameters())):
        return {name: weight.double().sum().item() for name, weight in trainer.model.named_parameters()}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
