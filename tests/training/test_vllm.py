"""TRL's trainers with vLLM as the engine: its own code, a tiny policy, in this process."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from spec_rollout.backends.vllm.colocated import engine_options
from spec_rollout.backends.vllm.worker import LiveWeights
from spec_rollout.training import PPOConfig, PPOTrainer, SpecGRPOConfig, SpecRLOOConfig, SpecRLOOTrainer
from tests.backends.vllm.tiny import SIZES, needs_vllm
from tests.training.conftest import OPTIONS, Digits


@pytest.fixture
def make_vllm_trainer(tokenizer, prompts, tmp_path, monkeypatch, eager_head):
    """Builds a trainer whose policy lies in a folder, for vLLM to start with."""
    from spec_rollout.training import SpecGRPOTrainer

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    quick = {"enforce_eager": True}  # compiling takes longer than the tests
    monkeypatch.setattr("spec_rollout.training.vllm.engine_options", lambda draft: engine_options(draft) | quick)
    torch.manual_seed(0)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    shape = {**SIZES, "vocab_size": len(tokenizer), "intermediate_size": 64, "initializer_range": 0.3, **special}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")

    def make(trainer_class=SpecGRPOTrainer, config_class=SpecGRPOConfig, **options):
        given = {**OPTIONS, "rollout_backend": "vllm", "num_speculative_tokens": 2, "max_slots": 8, **options}
        args = config_class(str(tmp_path / "run"), **given)
        policy = LlamaForCausalLM.from_pretrained(tmp_path / "policy")
        return trainer_class(policy, [Digits()], args, train_dataset=prompts, processing_class=tokenizer)

    return make


class LoseTheDraft(TrainerCallback):
    """After step 4 vLLM's worker takes no draft any more, and does not say so."""

    def __init__(self, patch):
        self.patch = patch

    def on_step_end(self, args, state, control, **others):
        if state.global_step == 4:
            self.patch.setattr(LiveWeights, "_load_draft", lambda self, tensors: None)


@needs_vllm
def test_policy_and_draft_follow_and_a_lost_draft_is_noticed_within_a_step(make_vllm_trainer, monkeypatch):
    trainer = make_vllm_trainer(max_steps=6, max_completion_length=24)
    trainer.add_callback(LoseTheDraft(monkeypatch))
    with pytest.warns(RuntimeWarning, match="what was pushed did not arrive"):
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "speculative/goodput" in entry]
    assert len(logged) == 6
    # the policy has moved by much more than that
    assert all(entry["sampling/sampling_logp_difference/max"] < 1e-3 for entry in logged)
    assert [entry["speculative/draft_healthy"] for entry in logged] == [1, 1, 1, 1, 0, 0]
    assert [entry["speculative/draft_version"] for entry in logged] == [1, 2, 3, 4, 5, 6]
    assert all(entry["speculative/acceptance_rate"] > 0 for entry in logged[1:4])
    assert "speculative/acceptance_rate" not in logged[4]
    backend = trainer.sampler.backend
    assert backend.engine.versions() == [backend.delivery.version] * 2 and backend.delivery.version == 6


@needs_vllm
def test_rloo_and_a_measured_schedule(make_vllm_trainer):
    trainer = make_vllm_trainer(SpecRLOOTrainer, SpecRLOOConfig, num_speculative_tokens=None, max_steps=2)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "speculative/goodput" in entry]
    assert logged[-1]["speculative/draft_version"] == 2 and logged[-1]["speculative/draft_healthy"] == 1
    assert logged[-1]["sampling/sampling_logp_difference/max"] < 1e-3
    schedule = trainer.sampler.backend.controller.schedule(8, 64)
    assert schedule[0][0] == 1 and schedule[-1][1] == 8


@needs_vllm
def test_ppo_on_vllm(make_vllm_trainer):
    given = {"num_generations": 1, "kl_coef": 0.0, "max_steps": 3, "num_iterations": 1}
    trainer = make_vllm_trainer(PPOTrainer, PPOConfig, max_completion_length=24, **given)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "speculative/goodput" in entry]
    assert [entry["speculative/draft_version"] for entry in logged] == [1, 2, 3]
    assert all(entry["sampling/sampling_logp_difference/max"] < 1e-3 for entry in logged)
    assert all(entry["speculative/draft_healthy"] == 1 for entry in logged)
    assert logged[-1]["speculative/acceptance_rate"] > 0
    weights = [name for name, _ in trainer.model.named_parameters() if name.startswith("value_function")]
    pushed = [name for name, _ in trainer.sampler.backend.engine.policy()]
    assert weights and len(pushed) == len(list(trainer.model.parameters())) - len(weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": 0.1, "verification": "rejection"}, "min_p=0.1 .*refuses it beside guesses"),
        ({"vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size=2 .*set it to 1 .*--tensor_parallel_size"),
        ({"vllm_structured_outputs_regex": "a*"}, "vllm_structured_outputs_regex='a"),
        ({"calibration_cache": "there"}, "calibration_cache='there' .*leave it out"),
        ({"vllm_importance_sampling_correction": False}, "draft_refresh to False"),
    ],
)
def test_what_vllm_cannot_serve_is_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr("spec_rollout.backends.vllm.engine.find_spec", lambda name: name)
    with pytest.raises(ValueError, match=message):
        SpecGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, rollout_backend="vllm", **options)


def test_min_p_goes_with_coupled_verification(tmp_path, monkeypatch):
    monkeypatch.setattr("spec_rollout.backends.vllm.engine.find_spec", lambda name: name)
    SpecGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, rollout_backend="vllm", min_p=0.1)


def test_without_vllm_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("spec_rollout.backends.vllm.engine.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install '\.\[vllm\]'"):
        SpecGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, rollout_backend="vllm")


def test_an_unknown_backend_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rollout_backend=sglang .*one of embedded, vllm"):
        SpecGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, rollout_backend="sglang")
