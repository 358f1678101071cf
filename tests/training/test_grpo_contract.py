"""The private names of TRL and transformers that the trainer touches: a change shows here first."""

from __future__ import annotations

import inspect

import pytest
from transformers import GenerationConfig, Trainer
from trl import GRPOTrainer
from trl.distributed import DistributedBackend
from trl.models import unwrap_model_for_generation

from spec_rollout.training import SpecGRPOTrainer

SIGNATURES = {
    GRPOTrainer._generate: "self, prompts",
    GRPOTrainer._generate_single_turn: (
        "self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images"
    ),
    GRPOTrainer._tokenize_prompts: "self, prompts",
    GRPOTrainer._save_checkpoint: "self, model, trial",
    GRPOTrainer._load_optimizer_and_scheduler: "self, checkpoint",
    Trainer._get_output_dir: "self, trial",
    unwrap_model_for_generation: (
        "model, accelerator, gather_deepspeed3_params, generation_kwargs, gradient_checkpointing_kwargs"
    ),
    DistributedBackend.summon_full_params: "self, module, kwargs",
    GenerationConfig._get_default_generation_params: "",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_signatures(function):
    assert ", ".join(inspect.signature(function).parameters) == SIGNATURES[function]


def test_overrides_have_the_signatures_of_what_they_override():
    for name in ("_generate", "_generate_single_turn", "_save_checkpoint", "_load_optimizer_and_scheduler"):
        ours, theirs = (inspect.signature(getattr(cls, name)) for cls in (SpecGRPOTrainer, GRPOTrainer))
        assert ours.parameters.keys() == theirs.parameters.keys()
    parameters = list(inspect.signature(GRPOTrainer.__init__).parameters)
    assert parameters[1:4] == ["model", "reward_funcs", "args"]


def test_attributes(make_trainer):
    trainer = make_trainer()
    for name in ("_dist", "_is_vlm", "_metrics", "_tokenizer", "eos_token_ids", "generation_config", "model_wrapped"):
        assert hasattr(trainer, name)
    assert set(trainer._metrics) == {"train", "eval"}


def test_trl_restores_and_saves_through_the_overridden_hooks(make_trainer, peeking, monkeypatch):
    called = []
    for name in ("save", "load"):
        monkeypatch.setattr(
            f"spec_rollout.training.sampler.TrainerSampler.{name}", lambda *a, n=name: called.append(n)
        )
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(**saving).train()
    assert called == ["save", "save"]
    trainer = make_trainer(**saving)
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-1")
    assert called == ["save", "save", "load", "save"]


def test_a_generation_phase_samples_through_the_overridden_method(make_trainer, peeking, monkeypatch):
    """One call per phase for plain prompts, with the prompts already repeated."""
    calls = []
    original = SpecGRPOTrainer._generate_single_turn

    def spy(self, prompt_ids, *others, **named):
        calls.append(prompt_ids)
        return original(self, prompt_ids, *others, **named)

    monkeypatch.setattr(SpecGRPOTrainer, "_generate_single_turn", spy)
    make_trainer(max_steps=1).train()
    (prompt_ids,) = calls
    assert len(prompt_ids) == 8 and prompt_ids[0] == prompt_ids[3] != prompt_ids[4]
