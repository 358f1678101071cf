"""Every private name of vLLM that this package uses is there, and takes what it is given."""

import importlib
import inspect

import pytest

from spec_rollout.backends.vllm.keyed_batch import PLACE, keyed, request_key
from tests.backends.vllm.tiny import make_backend, needs_vllm, runner, save_policy

pytestmark = needs_vllm

RUNNER = "vllm.v1.worker.cpu_model_runner.CPUModelRunner"
PROPOSER = "vllm.v1.spec_decode.eagle.EagleProposer"
FUNCTIONS = {
    # coupled.py
    f"{RUNNER}._sample": "logits spec_decode_metadata",
    f"{PROPOSER}._sample_draft_tokens": "hidden_states sampling_metadata",
    f"{PROPOSER}._greedy_sample": "hidden_states",
    "vllm.v1.sample.sampler.Sampler.apply_logits_processors": "logits sampling_metadata predict_bonus_token",
    "vllm.v1.sample.sampler.Sampler.gather_logprobs": "logprobs num_logprobs token_ids",
    "vllm.v1.sample.rejection_sampler.RejectionSampler.apply_logits_processors": "logits sampling_metadata metadata",
    # lazy_head.py
    f"{RUNNER}.propose_draft_token_ids": "scheduler_output sampled_token_ids sampling_metadata hidden_states "
    "sample_hidden_states aux_hidden_states spec_decode_metadata common_attn_metadata slot_mappings",
    f"{PROPOSER}.propose": "num_speculative_tokens target_token_ids target_positions target_hidden_states "
    "next_token_ids token_indices_to_sample common_attn_metadata sampling_metadata mm_embed_inputs "
    "num_rejected_tokens_gpu slot_mappings",
    # worker.py
    f"{RUNNER}.reload_weights": "weights_iterator weights_path is_checkpoint_format",
    f"{RUNNER}.get_model": "",
    f"{RUNNER}._update_states": "scheduler_output",
    "vllm.v1.engine.async_llm.AsyncLLM.pause_generation": "mode wait_for_inflight_requests clear_cache",
    "vllm.v1.engine.async_llm.AsyncLLM.resume_generation": "",
    "vllm.v1.engine.async_llm.AsyncLLM.reset_prefix_cache": "reset_running_requests reset_connector",
    f"{RUNNER}.get_draft_model": "",
    "vllm.model_executor.model_loader.reload.initialize_layerwise_reload": "model",
    "vllm.model_executor.model_loader.reload.finalize_layerwise_reload": "args kwargs",
}
FIELDS = {
    "vllm.v1.outputs.SamplerOutput": {"sampled_token_ids", "logprobs_tensors"},
    "vllm.v1.spec_decode.metadata.SpecDecodeMetadata": {
        *("draft_token_ids", "num_draft_tokens", "target_logits_indices", "bonus_logits_indices"),  # and max_spec_len
    },
    "vllm.v1.sample.metadata.SamplingMetadata": {"max_num_logprobs"},
    "vllm.v1.attention.backend.CommonAttentionMetadata": {
        *("query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "num_actual_tokens", "max_query_len"),
        *("block_table_tensor", "slot_mapping", "seq_lens_cpu_upper_bound", "positions", "is_prefilling"),
    },
    "vllm.v1.core.sched.output.SchedulerOutput": {"num_spec_tokens_to_schedule", "finished_req_ids"},
}
HELD = {
    "": "input_batch requests query_start_loc max_num_reqs device dtype use_async_scheduling sampler drafter "
    "rejection_sampler positions vllm_config speculative_config",
    "input_batch": "req_ids num_reqs num_computed_tokens_cpu num_prompt_tokens sampling_metadata",
    "query_start_loc": "np",
    "sampler": "logprobs_mode",
    "drafter": "model method num_speculative_tokens max_num_tokens parallel_drafting use_heterogeneous_vocab",
    "drafter.model": "lm_head logits_processor draft_id_to_target_id compute_logits load_weights",
    "drafter.model.model": "layers",
}


def found(path):
    """The object at `path`: a module's, or a class's."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            thing = getattr(thing, part)
        return thing
    raise ModuleNotFoundError(path)


@pytest.mark.parametrize("path", FUNCTIONS)
def test_a_function_takes_what_it_is_given(path):
    assert [name for name in inspect.signature(found(path)).parameters if name != "self"] == FUNCTIONS[path].split()


def test_a_guesss_parameters_come_from_the_function_that_is_replaced():
    source = inspect.getsource(found("vllm.v1.sample.rejection_sampler.apply_sampling_constraints"))
    assert source.count("= expand_batch_to_tokens(") == 3


@pytest.mark.parametrize("path", FIELDS)
def test_a_record_has_the_fields_that_are_read(path):
    assert FIELDS[path] <= found(path).__dataclass_fields__.keys()


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    backend = make_backend(save_policy(tmp_path_factory.mktemp("policy")), num_speculative_tokens=1)
    backend.generate([[1, 2]])
    return backend


@pytest.mark.parametrize("owner", HELD)
def test_the_runner_holds_what_is_read(backend, owner):
    thing = runner(backend)
    for part in filter(None, owner.split(".")):
        thing = getattr(thing, part)
    assert [name for name in HELD[owner].split() if not hasattr(thing, name)] == []


def test_the_engine_asks_its_table_and_tells_its_loggers(backend):
    engine = backend.engine.llm.llm_engine
    assert engine.engine_core.engine_core.scheduler.dynamic_sd_lookup is backend.engine.log
    assert backend.engine.log in engine.logger_manager.stat_loggers


def test_the_key_of_each_prompt_of_a_request_is_found_by_its_id():
    from vllm import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    class Request:
        request_id, external_req_id = "cmpl-0a1b2c3d-11-1", None

    InputProcessor.assign_request_id(Request)
    params = SamplingParams(extra_args=keyed([(1, 2), (3, -4), (5, 6)], 0.0))
    assert PLACE.search(Request.request_id)[1] == "1" and request_key(Request.request_id, params) == (3, -4)
    assert request_key("cmpl-0a1b2c3d-11-2", params) == (5, 6)
    assert request_key("7-01234567", SamplingParams(extra_args=keyed([(8, 9)], 0.0))) == (8, 9)
