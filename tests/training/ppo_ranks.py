"""What one of several processes does: a few generations of PPO; writes what it saw.

torchrun --nproc_per_node 2 -m tests.training.ppo_ranks KIND FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "DS_BUILD_OPS": "0"}

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset

from spec_rollout.training import PPOConfig, PPOTrainer
from tests.training.conftest import OPTIONS, PPO, PROMPTS, Digits

ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}
STAGE_3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
KINDS = {
    "ddp": {"use_cpu": True},
    "zero2": {"deepspeed": {**ZERO, "zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": {**ZERO, "zero_optimization": STAGE_3}},
}
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
    report = {
        "weights": weights(trainer),
        "coef": trainer.kl_controller.coef,
        "log": [{name: row[name] for name in FIGURES if name in row} for row in trainer.state.log_history],
        "seen": trainer.reward_funcs[0].seen,
        "whitened": whitened,
        "kind": [trainer._dist.zero_stage, trainer.accelerator.num_processes],
    }
    Path(folder, f"rank{PartialState().process_index}.json").write_text(json.dumps(report))


def weights(trainer: PPOTrainer) -> dict[str, float]:
    """The sum of each parameter."""
    with trainer._dist.gather_params(list(trainer.model.parameters())):
        return {name: weight.double().sum().item() for name, weight in trainer.model.named_parameters()}


def join(kind: str) -> None:
    """Accelerate shards on accelerators only: it is told that there are some, and talks over gloo all the same."""
    if kind == "ddp":
        return
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *given: ("gloo", DistributedType.MULTI_GPU)
    if kind.startswith("zero"):
        import deepspeed.comm.torch

        deepspeed.comm.torch.build_shm_op = lambda: None  # it would be compiled first, and gloo serves as well
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
