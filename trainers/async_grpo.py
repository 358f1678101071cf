"""Asynchronous GRPO with speculative rollouts, on a server that `spec-rollout serve` has started.

    accelerate launch trainers/async_grpo.py --config recipes/arithmetic_async_grpo.yaml

A process of its own asks the server for completions all the time and scores them. Meanwhile, what one step does:
    1. take scored completions, at most `max_staleness` pushes old, packed into one row;
    2. take an optimiser step on the policy; the draft hears that pass;
    3. let the draft learn, and push policy and draft; the server holds its requests until both are there.

1 and the optimiser step are TRL's `AsyncGRPOTrainer`'s, untouched; the rest is `SpecAsyncGRPOTrainer`'s. Any option of
`SpecAsyncGRPOConfig` and of TRL's `ModelConfig` can be given in the file or on the command line, which wins.
"""

from spec_rollout.training import SpecAsyncGRPOConfig, SpecAsyncGRPOTrainer
from spec_rollout.training.launch import launch

if __name__ == "__main__":
    launch(SpecAsyncGRPOTrainer, SpecAsyncGRPOConfig)
