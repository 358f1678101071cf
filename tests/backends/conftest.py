import pytest

from spec_rollout.draft import refresh
from spec_rollout.gamma.saving import RolloutValue


@pytest.fixture
def patient_watchman(monkeypatch):
    """Heads that know a few greedy rollouts by heart are kept on, whatever else they are made to guess."""
    monkeypatch.setattr("spec_rollout.draft.watchman.WATCHED", 10**9)


@pytest.fixture
def generous(monkeypatch):
    """Whatever a training gains, it pays."""
    monkeypatch.setattr(refresh, "MAX_EPOCHS", 20)
    monkeypatch.setattr(RolloutValue, "hope", lambda self, rates: 1e9)
    monkeypatch.setattr(RolloutValue, "slope", lambda self, rates: 1e9)
