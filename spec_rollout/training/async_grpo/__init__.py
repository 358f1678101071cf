"""TRL's asynchronous GRPO on a server of this package."""
