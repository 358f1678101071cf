"""The private names of TRL and transformers that the trainer touches: a change shows here first."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields

import pytest
from transformers import GenerationConfig, Trainer
from trl import GRPOTrainer, RLOOTrainer
from trl.distributed import DistributedBackend
from trl.models import unwrap_model_for_generation

from spec_rollout.backends.vllm import guard
from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer, SpecRLOOConfig, SpecRLOOTrainer

TRAINERS = [(SpecGRPOTrainer, GRPOTrainer), (SpecRLOOTrainer, RLOOTrainer)]
SCORING = "self, model, input_ids, attention_mask, logits_to_keep"
SIGNATURES = {
    GRPOTrainer._generate: "self, prompts",
    RLOOTrainer._generate: "self, prompts",
    GRPOTrainer._generate_single_turn: (
        "self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images"
    ),
    RLOOTrainer._generate_single_turn: "self, prompt_ids, images, multimodal_fields",
    GRPOTrainer._generate_and_score_completions: "self, inputs",
    GRPOTrainer._compute_loss: "self, model, inputs",
    GRPOTrainer._tokenize_prompts: "self, prompts",
    RLOOTrainer._tokenize_prompts: "self, prompts",
    GRPOTrainer._calculate_rewards: "self, inputs, prompts, completions, completion_ids_list",
    RLOOTrainer._calculate_rewards: "self, inputs, prompts, completions, completion_ids_list",
    GRPOTrainer._tool_call_loop: (
        "self, prompts, prompt_ids, completion_ids, completions, logprobs, images, multimodal_fields"
    ),
    GRPOTrainer._save_checkpoint: "self, model, trial",
    RLOOTrainer._save_checkpoint: "self, model, trial",
    GRPOTrainer._load_optimizer_and_scheduler: "self, checkpoint",
    Trainer._load_optimizer_and_scheduler: "self, checkpoint",
    GRPOTrainer.create_model_card: "self, model_name, dataset_name, tags",
    Trainer._get_output_dir: "self, trial",
    unwrap_model_for_generation: (
        "model, accelerator, gather_deepspeed3_params, generation_kwargs, gradient_checkpointing_kwargs"
    ),
    DistributedBackend.__init__: "self, accelerator",
    GenerationConfig._get_default_generation_params: "",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_signatures(function):
    assert ", ".join(inspect.signature(function).parameters) == SIGNATURES[function]


@pytest.mark.parametrize("trainer", [GRPOTrainer, RLOOTrainer])
def test_scoring(trainer):
    """Its log-probs are the first of what it returns; read where the log-probs of the sampler are compared."""
    scoring = trainer._get_per_token_logps_and_entropies
    assert ", ".join(inspect.signature(scoring).parameters).startswith(SCORING)
    assert "return logps, entropies, aux_loss" in inspect.getsource(inspect.unwrap(scoring))


@pytest.mark.parametrize(("ours", "theirs"), TRAINERS)
def test_overrides_have_the_signatures_of_what_they_override(ours, theirs):
    for name in ("_generate", "_generate_single_turn", "_save_checkpoint", "_load_optimizer_and_scheduler"):
        parameters = [inspect.signature(getattr(trainer, name)).parameters.keys() for trainer in (ours, theirs)]
        assert parameters[0] == parameters[1]
    assert list(inspect.signature(theirs.__init__).parameters)[1:4] == ["model", "reward_funcs", "args"]


def test_after_sampling_use_vllm_tells_only_whether_to_correct():
    """`SpecGRPOTrainer` sets it there: each line that reads it must be about the correction, or run while sampling."""
    for scoring in (GRPOTrainer._generate_and_score_completions, GRPOTrainer._compute_loss):
        lines = inspect.getsource(inspect.unwrap(scoring)).splitlines()
        readers = [line for line in lines if "self.use_vllm" in line]
        assert readers and all(
            "self.use_vllm and self.vllm_importance_sampling_correction" in line for line in readers
        )
    for helper in (GRPOTrainer._calculate_rewards, GRPOTrainer._get_per_token_logps_and_entropies):
        assert "use_vllm" not in inspect.getsource(inspect.unwrap(helper))


@pytest.mark.parametrize("trainer", [GRPOTrainer, RLOOTrainer])
def test_the_last_token_is_read_only_to_tell_whether_a_completion_ended(trainer):
    """`JudgedTokens` answers there: both places, and no other, ask a completion for its last token."""
    judge = "[ids[-1] not in eos_and_pad for ids in completion_ids"
    for place in (trainer._generate, trainer._generate_and_score_completions):
        source = inspect.getsource(inspect.unwrap(place))
        assert source.count(judge) == 1 and source.count("ids[-1]") == 1
        assert "eos_and_pad = [*self.eos_token_ids, self._tokenizer.pad_token_id]" in source
    assert "ids[-1]" not in inspect.getsource(getattr(trainer, "_tool_call_loop", trainer._calculate_rewards))


@pytest.mark.parametrize(
    ("trainer_class", "config_class"), [(SpecGRPOTrainer, SpecGRPOConfig), (SpecRLOOTrainer, SpecRLOOConfig)]
)
def test_attributes(make_trainer, trainer_class, config_class):
    trainer = make_trainer(trainer_class, config_class)
    for name in ("_dist", "_is_vlm", "_metrics", "_tokenizer", "eos_token_ids", "generation_config", "model_wrapped"):
        assert hasattr(trainer, name)
    assert set(trainer._metrics) == {"train", "eval"}
    assert (trainer._dist.is_zero3, trainer._dist.fsdp_version) == (False, None)


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


def test_what_the_asynchronous_trainer_asks_of_a_server():
    """docs/vllm.md says what of it is served, and by what the other routes are replaced."""
    client = pytest.importorskip("trl.experimental.async_grpo.vllm_client")
    trainer = pytest.importorskip("trl.experimental.async_grpo.async_grpo_trainer")
    routes = set(re.findall(r"\{self\.server_url\}(/\w+(?:/\w+)*)", inspect.getsource(client)))
    answered = {"/health", "/v1/models", "/server_info", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
    closed = {"/get_world_size", "/pause", "/resume", "/init_weight_transfer_engine", "/start_weight_update"}
    assert routes == answered | closed | {"/update_weights", "/finish_weight_update"}
    assert all(path in guard.PATHS or path.startswith("/v1/") for path in answered)
    assert not (routes - answered) & guard.PATHS
    methods = {"init_weight_transfer", "pause", "send_weights", "resume", "destroy"}
    assert {name for name in vars(trainer.WeightTransferProtocol) if not name.startswith("_")} == methods
    assert "weight_transfer" in inspect.signature(trainer.AsyncGRPOTrainer).parameters


def test_what_our_asynchronous_trainer_takes_over():
    """Names of its own that are overridden or read, and the one name in its `__init__` that needs CUDA."""
    trainer = pytest.importorskip("trl.experimental.async_grpo.async_grpo_trainer")
    worker = pytest.importorskip("trl.experimental.async_grpo.async_rollout_worker")
    ours = trainer.AsyncGRPOTrainer
    assert "get_peak_flops_per_device" in ours.__init__.__code__.co_names
    assert list(inspect.signature(ours.compute_loss).parameters)[1:] == [
        *("model", "inputs", "return_outputs", "num_items_in_batch"),
    ]
    for name in ("_sync_weight", "_streaming_iter", "get_train_dataloader", "_save_checkpoint"):
        assert callable(vars(ours)[name])
    source = inspect.getsource(ours)
    assert "self.weight_transfer.send_weights(self._streaming_iter())" in source
    assert "check_health_fn=self.rollout_worker.check_health" in source
    loop = worker._AsyncRolloutLoop
    assert list(inspect.signature(loop._generate_one).parameters) == [
        "self",
        "prompt",
        "tool_dict",
        "tools",
        "group_id",
    ]
    assert list(inspect.signature(loop._post).parameters) == ["self", "path", "payload", "timeout", "max_retries"]
    assert list(inspect.signature(loop._score_group).parameters) == ["self", "group"]
    assert 'self._post("/v1/completions", payload, self.request_timeout)' in inspect.getsource(loop._generate_one_turn)
    assert worker.AsyncRolloutWorker._loop_cls is loop
    assert {"rollout_id", "input_ids"} <= {field.name for field in fields(worker.TrainingSequence)}
    assert {"completions_sequences"} <= {field.name for field in fields(worker.RolloutGroup)}
    assert re.search(r"_RETRYABLE_HTTP_ERRORS = \(.*ConnectionResetError\)", inspect.getsource(worker))


def test_what_the_asynchronous_trainer_packs():
    packing = pytest.importorskip("trl.experimental.async_grpo.packing")
    given = list(inspect.signature(packing.tree_attention).parameters)
    assert given[:5] == ["module", "query", "key", "value", "attention_mask"]
    assert {"tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k", "scaling", "sliding_window"} <= set(given)
