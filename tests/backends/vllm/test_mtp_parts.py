"""MTP heads in vLLM, without one: how it is started, what is refused, and what the read-back tells apart."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from spec_rollout.backends.vllm import serve as vllm_serve
from spec_rollout.backends.vllm.draft import PROBE_ERROR
from spec_rollout.backends.vllm.engine import own_speculative_config, speculative_config
from spec_rollout.backends.vllm.mtp_readback import ROWS, probe_mtp
from spec_rollout.backends.vllm.readback import mean_response, response
from spec_rollout.backends.vllm.served import refuse_other_draft
from spec_rollout.backends.vllm.steady import refuse_crowded, refuse_precision, refuse_unsteady, room, step_tokens
from spec_rollout.config import SpecConfig
from spec_rollout.draft.checkpoint import save_head
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.mtp_checkpoint import add_to_policy, save_mtp
from spec_rollout.draft.mtp_names import QWEN, appended
from spec_rollout.draft.own_head import checkpoints_own, refuse_other_kind
from spec_rollout.gamma import GammaController
from spec_rollout.gamma.cost_model import CostModel, Measurement
from tests.backends.vllm.test_parts import asked
from tests.draft.test_mtp import random_head
from tests.tiny import policy


def test_a_server_guesses_with_the_policys_own_head_and_caches_no_prefixes(tmp_path):
    given = asked(tmp_path, "qwen3_5_text")
    add_to_policy(given.policy, random_head(policy("qwen3_5_text"), QWEN).on_disk(torch.float32))
    with pytest.raises(ValueError, match="2 was not tested with MTP heads: give 1, or --num_speculative_tokens 0"):
        vllm_serve.serve_command(given, tmp_path / "draft")
    given.tensor_parallel_size = 1
    command = vllm_serve.serve_command(given, tmp_path / "draft")
    line = " ".join(command)
    assert '"method": "mtp"' in line and "--no-enable-prefix-caching" in line and "per_batch_size" not in line
    with pytest.raises(ValueError, match="--enable-prefix-caching is refused"):
        vllm_serve.refuse_cached_prefixes(command, ["--enable_prefix_caching"])
    given.draft_head = "eagle3"
    with pytest.raises(ValueError, match="has recurrent layers.*no EAGLE-3 head"):
        vllm_serve.serve_command(given, tmp_path / "draft")


def test_a_server_that_would_lose_states_is_refused():
    wanted = own_speculative_config(3, 4, steady=True)
    served = {"speculative_config": wanted, "cache_config": {"enable_prefix_caching": False}}
    served["scheduler_config"] = {"max_num_seqs": 4, "max_num_batched_tokens": 16}
    refuse_other_draft("url", served, wanted)
    served["scheduler_config"]["max_num_batched_tokens"] = 15
    with pytest.raises(ValueError, match="4 rows with 3 guesses each are 16 tokens, but vLLM takes 15 in one"):
        refuse_other_draft("url", served, wanted)
    served["cache_config"]["enable_prefix_caching"] = True
    with pytest.raises(ValueError, match="caches prefixes.*recurrent layers"):
        refuse_other_draft("url", served, wanted)
    changing = {"speculative_config": own_speculative_config(3, 4, steady=False), "cache_config": {}}
    changing["cache_config"]["enable_prefix_caching"] = False
    with pytest.raises(ValueError, match="changes the number of guesses"):
        refuse_other_draft("url", changing, wanted)
    with pytest.raises(ValueError, match="guesses by method 'mtp', the trainer pushes a head for 'eagle3'"):
        refuse_other_draft("url", served, speculative_config("folder", 3, 4))


def test_a_step_without_room_for_all_guesses_is_refused():
    wanted, changing = (own_speculative_config(3, 4, steady=steady) for steady in (True, False))
    assert step_tokens(wanted, 1025) == 4100 and step_tokens(changing, 1025) == step_tokens(None, 1025) == 0
    refuse_crowded(wanted, 1024, 4096)
    refuse_crowded(changing, 1025, 4096)
    with pytest.raises(ValueError, match="1025 rows with 3 guesses each are 4100 tokens, but vLLM takes 4096"):
        refuse_crowded(wanted, 1025, 4096)


def test_what_would_change_the_number_of_guesses_is_refused():
    most = room(own_speculative_config(3, 4, steady=True), 64)
    assert most == 61 and room(own_speculative_config(3, 4, steady=False), 64) is None
    refuse_unsteady([[1] * 60, [1, 2]], [1, 59], most)
    refuse_unsteady([[1]], [99], None)
    with pytest.raises(ValueError, match="Prompt 1 of 2 tokens with 60 new ones is longer than 61 tokens"):
        refuse_unsteady([[1] * 60, [1, 2]], [1, 60], most)
    with pytest.raises(ValueError, match="Prompt 0 is a single token"):
        refuse_unsteady([[1]], [9], most)


def test_which_mtp_heads_vllm_is_given(tmp_path):
    for name, names in (("qwen3_5_text", QWEN), ("deepseek_v3", appended(2))):
        model = policy(name)
        model.save_pretrained(tmp_path / name)
        add_to_policy(tmp_path / name, random_head(model, names).on_disk(torch.float32))
        model.config._name_or_path = str(tmp_path / name)
        found = checkpoints_own(model, SpecConfig(rollout_backend="vllm"))
        assert bool(found) == (name == "qwen3_5_text")
    with pytest.raises(ValueError, match="not seen to guess rightly.*'deepseek_v3'.* draft_head='eagle3', or"):
        checkpoints_own(model, SpecConfig(rollout_backend="vllm", draft_head="mtp"))


@pytest.mark.parametrize("kind", ["auto", "mtp"])
@pytest.mark.parametrize("fault", ["another shape", "another model type", "quantised"])
def test_where_an_eagle_head_cannot_stand_in_none_is_offered(tmp_path, kind, fault):
    """The policy has recurrent layers: what is wrong with its own head is the last word, and nothing is made."""
    model = policy("qwen3_5_text")
    model.save_pretrained(tmp_path)
    model.config._name_or_path = str(tmp_path)
    tensors = random_head(model, QWEN).on_disk(torch.float32)
    if fault == "another model type":
        (tmp_path / "config.json").write_text('{"model_type": "qwen3_5"}')
    else:
        name = "mtp.layers.0.input_layernorm.weight"
        tensors[name] = torch.zeros(3) if fault == "another shape" else tensors[name].to(torch.float8_e4m3fn)
    add_to_policy(tmp_path, tensors)
    said = {"another shape": "of another shape", "another model type": "holds a 'qwen3_5'", "quantised": "quantised"}
    with warnings.catch_warnings(), pytest.raises(ValueError, match=said[fault]) as told:
        warnings.simplefilter("error")
        checkpoints_own(model, SpecConfig(rollout_backend="vllm", draft_head=kind))
    assert "set num_speculative_tokens=0, or rollout_backend='embedded'" in str(told.value)
    assert "draft_head='eagle3'" not in str(told.value)


def test_another_head_that_stands_in_is_told_of(tmp_path):
    model = policy("deepseek_v3")
    model.save_pretrained(tmp_path)
    add_to_policy(tmp_path, random_head(model, appended(2)).on_disk(torch.float32))
    model.config._name_or_path = str(tmp_path)
    with pytest.warns(RuntimeWarning, match="not seen to guess rightly.*An EAGLE-3 head is made"):
        assert not checkpoints_own(model, SpecConfig(rollout_backend="vllm"))


@pytest.mark.parametrize("stacked", [True, False])
def test_the_read_back_of_an_mtp_head_tells_its_parts_apart(stacked):
    model = policy("glm4_moe")
    head = random_head(model, appended(2)._replace(stacked=stacked))
    before = probe_mtp(head.apart())
    for name, weight in head.named_parameters():
        kept = weight.data
        weight.data = 1.05 * kept
        changed = [part for part, value in probe_mtp(head.apart()).items() if value != before[part]]
        weight.data = kept
        assert len(changed) == 1, name


def test_a_head_of_the_other_kind_than_vllm_is_started_with_is_refused(tmp_path):
    model = policy("qwen3_5_text")
    save_mtp(tmp_path / "mtp", random_head(model, QWEN), {})
    save_head(tmp_path / "eagle", EagleHead(HeadConfig.for_target(policy("llama").config)), None, None, {})
    config = SpecConfig(rollout_backend="vllm")
    refuse_other_kind(tmp_path / "mtp", True, config)
    refuse_other_kind(tmp_path / "eagle", False, config)
    with pytest.raises(ValueError, match="holds no MTP head.*without recurrent layers, set draft_head='eagle3'"):
        refuse_other_kind(tmp_path / "eagle", True, config)
    with pytest.raises(ValueError, match="holds an MTP head.*draft_head='mtp'"):
        refuse_other_kind(tmp_path / "mtp", False, config)
    refuse_other_kind(tmp_path / "mtp", False, SpecConfig())


def test_a_delta_rule_in_float32_is_refused_on_a_cpu():
    refuse_precision("qwen3_next", "float32", on_cpu=False)
    refuse_precision("qwen3_next", "bfloat16", on_cpu=True)
    refuse_precision("glm4_moe", "float32", on_cpu=True)
    with pytest.raises(ValueError, match="'qwen3_next' in bfloat16 alone on a CPU, not in float32: set bf16=True"):
        refuse_precision("qwen3_next", "float32", on_cpu=True)


@pytest.mark.parametrize("line", ["--dtype float32", "--dtype=half"])
def test_a_server_in_another_dtype_is_refused_before_it_starts(tmp_path, line, monkeypatch):
    platforms = pytest.importorskip("vllm.platforms")
    monkeypatch.setattr(platforms.current_platform, "is_cpu", lambda: True)
    policy("qwen3_5_text").save_pretrained(tmp_path)
    vllm_serve.refuse_dtype(str(tmp_path), [])
    vllm_serve.refuse_dtype(str(tmp_path), ["--dtype", "bfloat16"])
    with pytest.raises(ValueError, match="--dtype bfloat16"):
        vllm_serve.refuse_dtype(str(tmp_path), line.split())


@pytest.mark.parametrize("kind", ["auto", "mtp"])
def test_a_damaged_file_is_named(tmp_path, kind):
    model = policy("glm4_moe")
    model.save_pretrained(tmp_path)
    model.config._name_or_path = str(tmp_path)
    add_to_policy(tmp_path, random_head(model, appended(2)).on_disk(torch.float32))
    file = tmp_path / "mtp.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"mtp.safetensors is no whole file of weights .*: copy it again"):
        checkpoints_own(model, SpecConfig(rollout_backend="vllm", draft_head=kind))


def test_a_head_for_a_server_is_the_policys_own_and_brings_its_schedule(tmp_path):
    given = asked(tmp_path, "glm4_moe")
    add_to_policy(given.policy, random_head(policy("glm4_moe"), appended(2)).on_disk(torch.float32))
    given.tensor_parallel_size, given.draft_head, given.draft = 1, "mtp", str(tmp_path / "head")
    with pytest.raises(ValueError, match="head is not a readable draft head"):
        vllm_serve.draft_config(given, tmp_path / "draft")
    cells = [Measurement("verify", rows, tokens, 64, 1.0 + rows * tokens) for rows in (1, 4) for tokens in (1, 3)]
    controller = GammaController(CostModel(cells), 2)
    controller.draft_ready = True
    saved = {"controller": {"vllm": controller.state_dict()}, "draft_ids": None}
    save_mtp(given.draft, random_head(policy("glm4_moe"), appended(2)), saved)
    found = vllm_serve.draft_config(given, tmp_path / "draft")["num_speculative_tokens_per_batch_size"]
    assert found == [list(part) for part in controller.schedule(4, vllm_serve.CONTEXT)] and found[-1][-1] == 0
    given.draft_head = "auto"
    with pytest.raises(ValueError, match="holds an MTP head.*draft_head='mtp'"):
        vllm_serve.draft_config(given, tmp_path / "draft")


def test_rounding_of_a_single_output_is_no_lost_head():
    """Such as the gate of a shared expert."""
    generator, gate = torch.Generator().manual_seed(0), torch.nn.Linear(64, 1, bias=False).bfloat16()
    gate.input_size = 64
    gate.quant_method = SimpleNamespace(apply=lambda layer, given: layer(given))
    for _ in range(200):
        weight = torch.randn(1, 64, generator=generator)
        gate.weight.data.copy_(weight)
        assert response(gate, rows=ROWS) == pytest.approx(mean_response(weight, rows=ROWS), rel=PROBE_ERROR)
