"""Two processes on the CPU learn one policy and one value function."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, os, sys
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from spec_rollout.training import PPOConfig, PPOTrainer

def first_half(completion_ids, **kwargs):
    return [sum(token >= 29 for token in ids) / len(ids) for ids in completion_ids]

folder, out, steps = sys.argv[1:]
args = PPOConfig(
    out, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
    per_device_train_batch_size=4, num_iterations=2, steps_per_generation=int(steps), max_steps=4 * int(steps),
    max_completion_length=8, learning_rate=1e-2, kl_coef=0.1, kl_target=0.05, kl_horizon=50,
    num_speculative_tokens=2, gradient_checkpointing=False, shuffle_dataset=False,
)
prompts = Dataset.from_dict({"prompt": ["one", "a", "count", "the fox", "b c d", "zero", "hello", "7 8 9"] * 4})
trainer = PPOTrainer(folder, first_half, args, train_dataset=prompts)
whitened = []
kept = trainer._generate_and_score_completions
def spy(inputs):
    batch = kept(inputs)
    whitened.append((batch["advantages"].sum().item(), batch["loss_mask"].sum().item()))
    return batch
trainer._generate_and_score_completions = spy
trainer.train()
state = {name: weight.double().sum().item() for name, weight in trainer.model.named_parameters()}
names = ("kl", "kl_coef", "policy_loss", "explained_variance", "reward", "advantages/std")
logs = [{name: entry[name] for name in names if name in entry} for entry in trainer.state.log_history]
result = {"weights": state, "whitened": whitened, "logs": logs, "coef": trainer.kl_controller.coef,
          "seeds": trainer.sampler._seed(trainer), "version": trainer.sampler.backend.draft_version}
with open(f"{out}.{os.environ.get('RANK', 0)}.json", "w") as file:
    json.dump(result, file)
"""


def test_two_ranks_learn_the_same(make_policy, tokenizer, tmp_path):
    make_policy().save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path / "policy"), str(tmp_path / "out"), "1"],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"out.{rank}.json").read_text()) for rank in (0, 1))
    assert first["weights"] == second["weights"]
    assert first["weights"]["value_function.weight"] != 0
    assert first["coef"] == second["coef"] != 0.1
    assert first["seeds"] != second["seeds"]
    assert first["logs"] == second["logs"] and any("explained_variance" in entry for entry in first["logs"])
    for (own, tokens), (other, others) in zip(first["whitened"], second["whitened"], strict=True):
        assert abs(own) > 1e-2 and abs(own + other) < 1e-3 * (tokens + others)  # mean 0 over both, not over each
