"""vLLM as the engine: in the trainer's process or on a server, with policy and draft pushed to it."""
