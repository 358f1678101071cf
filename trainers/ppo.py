"""PPO with speculative rollouts.

    accelerate launch trainers/ppo.py --config recipes/arithmetic_ppo.yaml

What one generation does:
    1. sample a completion of each prompt; the draft guesses, the policy verifies;
    2. let the draft learn from them, so that it follows the policy;
    3. score them, take the KL to the reference off each token's reward, and estimate each token's advantage from the
       value function;
    4. take `num_iterations` epochs of optimiser steps on the policy and the value function, both losses clipped.

1 and 2 are those of `SpecGRPOTrainer`, 3 and 4 `PPOTrainer`'s; prompts, rewards, logging and checkpoints are TRL's.
Any option of `PPOConfig` and of TRL's `ModelConfig` can be given in the file or on the command line, which wins.
"""

from spec_rollout.training import PPOConfig, PPOTrainer
from spec_rollout.training.launch import launch

if __name__ == "__main__":
    launch(PPOTrainer, PPOConfig)
