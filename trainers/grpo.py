"""GRPO with speculative rollouts.

    accelerate launch trainers/grpo.py --config recipes/arithmetic_grpo.yaml

What one step does:
    1. sample `num_generations` completions of each prompt; the draft guesses, the policy verifies;
    2. let the draft learn from them, so that it follows the policy;
    3. score them, and take each reward relative to its group as the advantage;
    4. take an optimiser step on the policy.

1 and 2 are `SpecGRPOTrainer`'s; 3 and 4 are TRL's `GRPOTrainer`, untouched. Any option of `SpecGRPOConfig` and of
TRL's `ModelConfig` can be given in the file or on the command line, which wins.
"""

from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer
from spec_rollout.training.launch import launch

if __name__ == "__main__":
    launch(SpecGRPOTrainer, SpecGRPOConfig)
