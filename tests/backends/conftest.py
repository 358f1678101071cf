import pytest


@pytest.fixture
def patient_watchman(monkeypatch):
    """Heads that know a few greedy rollouts by heart are kept on, whatever else they are made to guess."""
    monkeypatch.setattr("spec_rollout.draft.watchman.WATCHED", 10**9)
