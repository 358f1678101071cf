"""Recorded rollouts under other slots, ranks and costs."""
