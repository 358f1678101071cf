"""The sampler's log-probs beside the trainer's: logged, and corrected for where the user asks for it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig

from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer, SpecRLOOConfig, SpecRLOOTrainer
from tests.training.test_grpo import assert_same, trained, weights

BOTH = [(SpecGRPOTrainer, SpecGRPOConfig), (SpecRLOOTrainer, SpecRLOOConfig)]
DIFFERENCE = "sampling/sampling_logp_difference"
VARIATIONS = {
    "aligned": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "reused": {"num_iterations": 2},
    "split": {"steps_per_generation": 2},
    "penalised": {"beta": 0.1, "arguments": {"peft_config": LoraConfig(r=4, target_modules=["q_proj"])}},
}


@pytest.fixture
def biased(peeking, monkeypatch) -> float:
    """The sampler reports each log-prob too low by this much."""
    generate = peeking.generate

    def biased(self, *given, **options):
        completions = generate(self, *given, **options)
        return [replace(c, logprobs=[value - 0.5 for value in c.logprobs]) for c in completions]

    monkeypatch.setattr(peeking, "generate", biased)
    return 0.5


@pytest.mark.parametrize("variation", VARIATIONS)
@pytest.mark.parametrize(("trainer_class", "config_class"), BOTH)
def test_the_difference_is_rounding(make_trainer, peeking, trainer_class, config_class, variation):
    logged = trained(make_trainer(trainer_class, config_class, **VARIATIONS[variation])).state.log_history
    found = [entry for entry in logged if f"{DIFFERENCE}/mean" in entry]
    assert found and all(0 <= entry[f"{DIFFERENCE}/mean"] <= entry[f"{DIFFERENCE}/max"] < 1e-4 for entry in found)


@pytest.mark.parametrize("variation", VARIATIONS)
@pytest.mark.parametrize(("trainer_class", "config_class"), BOTH)
def test_a_difference_is_seen(make_trainer, biased, trainer_class, config_class, variation):
    logged = trained(make_trainer(trainer_class, config_class, **VARIATIONS[variation])).state.log_history
    found = [entry for entry in logged if f"{DIFFERENCE}/mean" in entry]
    assert found and all(entry[f"{DIFFERENCE}/mean"] == pytest.approx(biased, abs=1e-4) for entry in found)
    assert all(entry[f"{DIFFERENCE}/max"] == pytest.approx(biased, abs=1e-4) for entry in found)


def test_it_is_logged_in_evaluation_too(make_trainer, biased, prompts):
    trainer = trained(make_trainer(arguments={"eval_dataset": prompts.select(range(4))}))
    assert trainer.evaluate()[f"eval_{DIFFERENCE}/mean"] == pytest.approx(biased, abs=1e-4)


def test_by_default_nothing_is_corrected(make_trainer, biased, peeking):
    trainer = trained(make_trainer())
    assert not any("sampling/importance_sampling_ratio/mean" in entry for entry in trainer.state.log_history)
    assert trainer.use_vllm is False


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask"])
def test_the_correction_is_trls(make_trainer, biased, mode):
    options = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.25, "max_steps": 1}
    trainer = make_trainer(importance_sampling_correction=True, **options)
    before = weights(trainer)
    trainer.train()
    ratio = {"token_truncate": 1.25, "token_mask": 0.0}[mode]  # of exp(0.5), which is above the bound
    logged = trainer.state.log_history[0]
    assert logged["sampling/importance_sampling_ratio/mean"] == pytest.approx(ratio)
    assert logged[f"{DIFFERENCE}/mean"] == pytest.approx(biased, abs=1e-4)
    moved = any(not torch.equal(before[name], weight) for name, weight in weights(trainer).items())
    assert moved == (ratio > 0)
    assert trainer.use_vllm is False


def test_the_correction_of_no_difference_changes_little(make_trainer, peeking):
    corrected = trained(make_trainer(importance_sampling_correction=True, max_steps=1, learning_rate=1e-3))
    assert corrected.state.log_history[0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
    plain = weights(trained(make_trainer(max_steps=1, learning_rate=1e-3)))
    close = [torch.isclose(plain[name], weight, atol=1e-4) for name, weight in weights(corrected).items()]
    assert torch.cat([c.flatten() for c in close]).float().mean() > 0.99  # Adam turns the sign of a rounding error


def test_what_the_processed_distribution_lacks_is_seen(make_trainer, peeking):
    """top-k renormalises what it keeps, so the sampler's log-probs lie above the trainer's."""
    logged = trained(make_trainer(top_k=3)).state.log_history[0]
    assert logged[f"{DIFFERENCE}/mean"] > 1e-2 and math.isfinite(logged[f"{DIFFERENCE}/max"])


def test_the_metric_leaves_training_as_it_is(make_trainer, peeking, monkeypatch):
    logged = trained(make_trainer())
    monkeypatch.setattr("spec_rollout.training.rollouts.log_difference", lambda *given: None)
    assert_same(logged, trained(make_trainer()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vllm_importance_sampling_correction": False}, "contradicts vllm_importance_sampling_correction=False"),
        ({"loss_type": "vespo", "vllm_importance_sampling_mode": "sequence_mask"}, "cannot correct loss_type='vespo'"),
    ],
)
def test_a_correction_that_cannot_be_made_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SpecGRPOConfig(str(tmp_path), importance_sampling_correction=True, bf16=False, use_cpu=True, **options)


def test_a_rollout_func_cannot_be_corrected(make_trainer):
    with pytest.raises(ValueError, match="importance_sampling_correction=True needs the log-probs"):
        make_trainer(importance_sampling_correction=True, arguments={"rollout_func": lambda prompts, trainer: {}})
