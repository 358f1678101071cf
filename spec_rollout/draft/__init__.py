"""Who guesses: the EAGLE-3 head, its training and checkpoints, and earlier rollouts."""
