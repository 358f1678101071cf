"""GRPO of a policy of `make_reference_policy` with and without speculation, on one process or two; prints what it saw.

python -m tests.training.reward_curves single POLICY STEPS
torchrun --nproc_per_node 2 -m tests.training.reward_curves ddp|zero2|zero3 POLICY STEPS
"""

from __future__ import annotations

import hashlib
import json
import sys
from tempfile import TemporaryDirectory

from accelerate.state import PartialState

from spec_rollout.tasks.arithmetic import accuracy_reward, prompt_dataset
from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer
from tests.training.processes import KINDS, join
from tests.training.ranks import digest


def main(kind: str, policy: str, steps: int) -> None:
    if kind != "single":
        join(kind)
    plain, speculative = (run(kind, policy, steps, gamma) for gamma in (0, None))
    figures = {
        "kind": kind,
        "rank": PartialState().process_index,
        "tokens": plain["tokens"],
        "identical_completions": plain["completions"] == speculative["completions"],
        "identical_weights": plain["weights"] == speculative["weights"],
        "rewards": plain["rewards"],
        "mean_acceptance_length": speculative["lengths"],
    }
    print(json.dumps(figures), flush=True)


def run(kind: str, policy: str, steps: int, gamma: int | None) -> dict:
    drawn: list[list[list[int]]] = []

    def reward(completion_ids, **columns) -> list[float]:
        drawn.append([list(ids) for ids in completion_ids])
        return accuracy_reward(**columns)

    with TemporaryDirectory() as folder:
        args = SpecGRPOConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=48 if kind == "single" else 24,
            num_generations=8,
            max_completion_length=320,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            beta=0.0,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            num_speculative_tokens=gamma,
            **KINDS.get(kind, {"use_cpu": True}),
        )
        trainer = SpecGRPOTrainer(policy, reward, args, prompt_dataset("rl", 2000, 0))
        trainer.train()
        with trainer.sampler.gathered(trainer) as whole:
            weights = digest(whole)
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {
        "completions": hashlib.sha256(json.dumps(drawn).encode()).hexdigest(),
        "tokens": sum(len(ids) for batch in drawn for ids in batch),
        "weights": weights,
        "rewards": [entry["reward"] for entry in log],
        "lengths": [entry["speculative/mean_acceptance_length"] for entry in log],
    }


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
