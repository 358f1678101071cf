"""PPO in the manner of TRL, on the same rollouts."""
