"""RLOO with speculative rollouts.

    accelerate launch trainers/rloo.py --config recipes/arithmetic_rloo.yaml

What one step does:
    1. sample `num_generations` completions of each prompt; the draft guesses, the policy verifies;
    2. let the draft learn from them, so that it follows the policy;
    3. score them, and take each reward relative to the mean of the others of its group as the advantage;
    4. take an optimiser step on the policy.

1 and 2 are `SpecRLOOTrainer`'s; 3 and 4 are TRL's `RLOOTrainer`, untouched. Any option of `SpecRLOOConfig` and of
TRL's `ModelConfig` can be given in the file or on the command line, which wins.
"""

from spec_rollout.training import SpecRLOOConfig, SpecRLOOTrainer
from spec_rollout.training.launch import launch

if __name__ == "__main__":
    launch(SpecRLOOTrainer, SpecRLOOConfig)
