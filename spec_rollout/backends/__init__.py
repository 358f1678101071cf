"""Where a rollout runs: the engine in the trainer's process, or vLLM, each with its draft."""
