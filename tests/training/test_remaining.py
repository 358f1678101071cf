"""The draft's budget is told how many generation phases the run still has."""

import pytest


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_steps": 3}, [2, 1, 0]),
        ({"max_steps": 4, "num_iterations": 2}, [1, 0]),
        ({"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, [3, 2, 1, 0]),
        ({"max_steps": 4, "steps_per_generation": 2, "per_device_train_batch_size": 4}, [1, 0]),
    ],
)
def test_remaining_phases(make_trainer, peeking, options, told):
    trainer = make_trainer(**options)
    trainer.train()
    assert trainer.sampler.backend.remaining == told
