"""Pages for a reader: a policy at every batch size, a training run over its steps."""
