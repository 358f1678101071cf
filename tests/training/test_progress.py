"""The bar over a long rollout: it counts completions, and leaves the engine as it was."""

from __future__ import annotations

import pytest

from spec_rollout.training import progress
from tests.training.test_grpo import trained


@pytest.mark.parametrize("silent", [False, True])
def test_a_bar_is_shown_and_counts_to_the_end(make_trainer, monkeypatch, capsys, silent):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    bars = []
    made = progress.tqdm

    def keeping(*given, **options):
        bars.append(made(*given, **options))
        return bars[-1]

    monkeypatch.setattr(progress, "tqdm", keeping)
    trainer = trained(make_trainer(disable_tqdm=silent, num_speculative_tokens=0))
    assert ("rollout:" in capsys.readouterr().err) != silent
    assert bool(bars) != silent and all(bar.n == bar.total > 0 for bar in bars)
    assert trainer.sampler.backend.engine.progress is None
