"""What one of several processes does: trains a tiny policy on a vLLM server that all share, and writes what it saw.

torchrun --nproc_per_node 2 -m tests.training.server_ranks KIND[+lora][+ppo][+rloo][+tools][+colocate][+embedded]
FOLDER, with the server's address in SERVER and the policy's folder in POLICY; colocate has a vLLM on each rank
instead, and embedded the embedded engine without guesses
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForCausalLM

from spec_rollout.backends.vllm.colocated import engine_options
from spec_rollout.draft import refresh, watchman
from spec_rollout.draft.budget import RefreshBudget
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import SamplingParams
from spec_rollout.training import (
    PPOConfig,
    PPOTrainer,
    SpecGRPOConfig,
    SpecGRPOTrainer,
    SpecRLOOConfig,
    SpecRLOOTrainer,
    vllm,
)
from spec_rollout.training.gathering import gathered_policy
from tests.training import tooled
from tests.training.conftest import OPTIONS, PROMPTS, Digits, build_tokenizer
from tests.training.processes import KINDS, join, report

GUESSES = 2
GREEDY = SamplingParams(max_new_tokens=24, temperature=0)


def main(kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    refresh.MAX_EPOCHS = 8  # these rollouts are short
    watchman.WATCHED = 10**9
    RefreshBudget.seconds = lambda self, *_: 1e9
    join(kind.split("+")[0])
    report(folder, {"digits": tools_run(kind, folder) if "tools" in kind else digits_run(kind, folder)})


def digits_run(kind: str, folder: Path) -> dict:
    trainer = make_trainer(kind, folder, max_steps=5, max_completion_length=24, learning_rate=1e-3)
    held = [] if "embedded" in kind else watched_pushes(trainer)
    trainer.train()
    backend, found = trainer.sampler.backend, {}
    backend.policy_version = trainer.state.global_step
    prompts = trainer.processing_class(PROMPTS).input_ids[dist.get_rank() :]  # unlike numbers of them
    found["greedy"] = [c.token_ids for c in backend.generate(prompts, GREEDY)]
    found["acceptance_length"] = backend.take_stats().mean_acceptance_length
    with gathered_policy(trainer) as policy:
        found["expected"] = [c.token_ids for c in RolloutEngine(policy).generate(prompts, GREEDY)]
    return found | {
        "held": held,
        "seen": trainer.reward_funcs[0].seen,
        "log": trainer.state.log_history,
        "kind": [trainer._dist.zero_stage, trainer._dist.fsdp_version, trainer.accelerator.num_processes],
    }


def tools_run(kind: str, folder: Path) -> dict:
    """Rank 1 calls tools once at most, and so has no more turns before rank 0 has none."""
    turns = 1 if os.environ["RANK"] == "1" else 3
    args = make_args(kind, folder, SpecGRPOConfig, **tooled.OPTIONS | {"max_tool_calling_iterations": turns})
    trainer = tooled.make_trainer(os.environ["POLICY"], args)
    trainer.train()
    reward = trainer.reward_funcs[0]
    return {"seen": reward.seen, "turns": [len(turns) for turns in reward.turns], "log": trainer.state.log_history}


def make_trainer(kind: str, folder: Path, **options) -> SpecGRPOTrainer:
    parts = kind.split("+")[1:]
    make, config = SpecGRPOTrainer, SpecGRPOConfig
    if "ppo" in parts:
        make, config = PPOTrainer, PPOConfig
        options |= {"num_generations": 1, "num_iterations": 1, "kl_coef": 0.0}
    if "rloo" in parts:
        make, config = SpecRLOOTrainer, SpecRLOOConfig
    args = make_args(kind, folder, config, gradient_checkpointing=False, **options)
    rows = Dataset.from_dict({"prompt": PROMPTS * 2})  # PPO takes as many at once
    policy = LlamaForCausalLM.from_pretrained(os.environ["POLICY"])
    adapter = (
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False) if "lora" in parts else None
    )
    return make(policy, Digits(), args, rows, processing_class=build_tokenizer(), peft_config=adapter)


def make_args(kind: str, folder: Path, config: type, **options):
    kind, *parts = kind.split("+")
    chosen = {name: value for name, value in OPTIONS.items() if name != "use_cpu"} | KINDS[kind]
    served = {
        "rollout_backend": "vllm",
        "vllm_mode": "server",
        "vllm_server_base_url": os.environ["SERVER"],
        "num_speculative_tokens": GUESSES,
    }
    if "colocate" in parts:
        served |= {"vllm_mode": "colocate", "vllm_server_base_url": None}
        quick = {"enforce_eager": True}  # compiling takes longer than the test
        vllm.engine_options = lambda draft: engine_options(draft) | quick
    if "embedded" in parts:
        served = {"num_speculative_tokens": 0}
    return config(str(folder), **(chosen | served | options))


def watched_pushes(trainer: SpecGRPOTrainer) -> list:
    """Fills with what the server says right after each push: versions, and what is wrong with the draft."""
    held: list = []
    make = trainer.sampler._make_backend

    def made(*given):
        make(*given)
        delivery = trainer.sampler.backend.delivery
        push = delivery.push

        def pushing(engine, *others):
            before = delivery.version
            push(engine, *others)
            if delivery.version != before:
                held.append([engine.versions() == [delivery.version] * 2, delivery.lost])

        delivery.push = pushing

    trainer.sampler._make_backend = made
    return held


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
