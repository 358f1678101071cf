"""The parts of the vLLM backend that need no vLLM."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from spec_rollout.backends.vllm import serve as vllm_serve
from spec_rollout.backends.vllm.draft import save_start, start_vocabulary
from spec_rollout.backends.vllm.engine import completion, sampling_options, speculative_config
from spec_rollout.backends.vllm.guard import GUARD
from spec_rollout.backends.vllm.readback import probe
from spec_rollout.backends.vllm.repairs import _expands, expand
from spec_rollout.backends.vllm.steps import Guesses, StepLog, step_stats
from spec_rollout.draft.checkpoint import save_head
from spec_rollout.draft.checkpoint_reader import load_head
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.gamma import FixedGamma
from spec_rollout.records import SamplingParams
from tests.tiny import make_policy, policy


class Watching(FixedGamma):
    """Keeps what it sees."""

    def __init__(self, gamma):
        super().__init__(gamma)
        self.seen = []

    def observe(self, stats):
        self.seen.append(stats)


def iteration(emitted, prompt_tokens=0, begun=0):
    return SimpleNamespace(
        num_generation_tokens=emitted, num_prompt_tokens=prompt_tokens, time_to_first_tokens_iter=[0.1] * begun
    )


def guessed(*numbers):
    return SimpleNamespace(spec_decoding_stats=Guesses(*numbers) if numbers else None)


def test_a_step_is_what_vllm_counted():
    log, controller = StepLog(limit=5), Watching(7)
    log.controller = controller
    assert log[3] == 5
    log.record(guessed(), iteration(4, prompt_tokens=40, begun=4))
    log.record(guessed(4, 12, 6, [3, 2, 1, 0, 0]), iteration(10))
    log.record(guessed(4, 12, 6, [3, 2, 1, 0, 0]), iteration(8))  # an end inside the guesses
    log.record(guessed(3, 9, 2, [1, 1, 0, 0, 0]), iteration(7, prompt_tokens=9, begun=2))  # two join
    log.record(guessed(), iteration(5))
    log.record(guessed(), None)
    steps, prefill_s = log.take()
    found = [(s.rows, s.gamma, s.emitted, s.accepted) for s in steps]
    assert found == [
        (4, 0, 4, []),
        (4, 3, 10, [3, 2, 1]),
        (4, 3, 8, [3, 2, 1]),
        (2, 0, 2, []),
        (3, 3, 5, [1, 1, 0]),
        (5, 0, 5, []),
    ]
    assert controller.seen == [steps[1], steps[2], steps[5]] and all(s.seconds > 0 for s in controller.seen)
    assert prefill_s > 0 and log.take() == ([], 0.0)


def test_no_counters_mean_no_guesses():
    assert step_stats(3, None).rows == 3 and step_stats(3, Guesses(0, 0, 0, [])).gamma == 0


def test_options_in_vllms_words():
    params = SamplingParams(max_new_tokens=7, top_k=4, eos_token_ids=(2,), stop_strings=("x",))
    options = sampling_options(params, 3, speculates=True)
    assert options["max_tokens"] == 3 and options["stop_token_ids"] == [2] and not options["ignore_eos"]
    assert options["stop"] == ["x"] and options["include_stop_str_in_output"]
    assert not options["skip_special_tokens"]
    assert sampling_options(SamplingParams(min_p=0.1), None, speculates=False)["min_p"] == 0.1
    with pytest.raises(ValueError, match=r"min_p=0.1 cannot be honoured.*embedded"):
        sampling_options(SamplingParams(min_p=0.1), None, speculates=True)


@pytest.mark.parametrize(
    ("ids", "given", "reason"),
    [([5, 2], "stop", "eos"), ([5, 6], "stop", "stop"), ([5, 6], "length", "length"), ([5, 2], "length", "length")],
)
def test_why_a_completion_ended(ids, given, reason):
    assert completion(ids, [0.0, 0.0], given, (2,)).finish_reason == reason


def test_each_guess_gets_its_rows_value():
    temperature, ends = torch.tensor([0.5, 0.0, 2.0, 3.0]), torch.tensor([2, 3, 3, 6])
    assert expand(temperature, ends, 6, replace_from=0, replace_to=1).tolist() == [0.5, 0.5, 1.0, 3.0, 3.0, 3.0]


def test_only_a_function_that_expands_passes_the_probe():
    wrong = [
        lambda x, ends, size: x.new_zeros(size),
        lambda x, ends, size: expand(x, ends, size) if x.is_floating_point() else x.new_zeros(size),
        lambda x, ends, size: x.repeat(size)[:size],
    ]
    assert _expands(expand) and not any(map(_expands, wrong))


def test_every_layer_shows_in_the_probe():
    head = EagleHead(HeadConfig.for_target(policy("llama").config))
    tensors = {**head.folded(), "lm_head.weight": torch.randn(9, 32), "d2t": torch.arange(9)}
    before = probe(tensors)
    for name in tensors:
        changed = {**tensors, name: tensors[name] * 1.5 + 1}
        assert [key for key in before if before[key] != probe(changed)[key]], name


def test_the_head_to_start_with_cannot_share_by_accident(tmp_path):
    shape = HeadConfig.for_target(make_policy("llama", vocab_size=9000).config)
    for own, size in ((None, 8192), (9000, None), (17, 17)):
        head = EagleHead(shape, own_output=own)
        given = torch.arange(17) if own == 17 else None
        ids = start_vocabulary(shape.vocab_size, given, head)
        assert (None if ids is None else len(ids)) == size
        weights = {name: tensor.clone() for name, tensor in head.state_dict().items()}
        save_start(tmp_path / "start", head, ids)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in head.state_dict().items())
        loaded, _, _ = load_head(tmp_path / "start", shape)
        assert loaded.own_output is None or not loaded.own_output.any()


def test_a_small_vocabulary_shares_the_policys_output_head(tmp_path):
    from safetensors.torch import load_file

    shape = HeadConfig.for_target(policy("llama").config)
    save_start(tmp_path / "start", EagleHead(shape), start_vocabulary(shape.vocab_size, None, EagleHead(shape)))
    assert not {"lm_head.weight", "d2t"} & load_file(tmp_path / "start" / "model.safetensors").keys()


def test_vllm_is_asked_for_lossless_speculation():
    config = speculative_config("folder", 4, 16)
    assert config["rejection_sample_method"] == "standard" and config["draft_sample_method"] == "probabilistic"
    assert config["num_speculative_tokens_per_batch_size"] == [[1, 16, 4]]


def asked(tmp_path, name: str) -> Namespace:
    """What `spec-rollout serve` is given for a policy of that architecture."""
    policy(name).save_pretrained(tmp_path / "policy")
    return Namespace(
        policy=str(tmp_path / "policy"),
        draft=None,
        num_speculative_tokens=2,
        tensor_parallel_size=2,
        max_slots=4,
        draft_head="auto",
        host="127.0.0.1",
        port=8001,
    )


def test_the_command_of_a_server(tmp_path):
    given = asked(tmp_path, "llama")
    line = " ".join(vllm_serve.serve_command(given, tmp_path / "draft"))
    assert f"--tensor-parallel-size 2 --middleware {GUARD}" in line
    assert "--host 127.0.0.1 --port 8001" in line and "--logprobs-mode processed_logprobs" in line
    assert '"num_speculative_tokens": 2' in line and str(tmp_path / "draft") in line
    given.num_speculative_tokens = 0
    assert "speculative" not in " ".join(vllm_serve.serve_command(given, tmp_path / "draft"))
    given.num_speculative_tokens, given.draft = 2, str(tmp_path)
    with pytest.raises(ValueError, match="not a readable draft head"):
        vllm_serve.serve_command(given, tmp_path / "draft")
    head, given.draft = EagleHead(HeadConfig.for_target(policy("llama").config)), str(tmp_path / "head")
    for measured in (None, FixedGamma(2).state_dict()):
        save_head(given.draft, head, None, None, {"controller": {"vllm": measured}})
        assert "[[1, 4, 2]]" in " ".join(vllm_serve.serve_command(given, tmp_path / "draft"))


@pytest.mark.parametrize(
    "option", ["--data-parallel-size=2", "--data_parallel_size", "-dp", "--pipeline-parallel-size"]
)
def test_several_engines_are_refused(monkeypatch, capsys, option):
    monkeypatch.setattr(vllm_serve, "require_vllm", lambda: None)
    assert vllm_serve.main(["--policy", "nowhere", option, "2"]) == 2
    assert f"{option.partition('=')[0].replace('_', '-')} is refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "bound"),
    [("max_slots", 0, "at least 1"), ("tensor_parallel_size", 0, "at least 1"), ("port", 99999, "within 1 and 65535")],
)
def test_a_number_out_of_range_is_named(monkeypatch, capsys, option, value, bound):
    monkeypatch.setattr(vllm_serve, "require_vllm", lambda: None)
    assert vllm_serve.main(["--policy", "nowhere", f"--{option}", str(value)]) == 2
    assert f"--{option} {value} is out of range: it must be {bound}." in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tensor_parallel_size", "--tensor-parallel-size", "-tp"])
def test_a_number_of_devices_is_heard_however_it_is_written(monkeypatch, tmp_path, option):
    asked_for = []
    monkeypatch.setattr(vllm_serve, "serve_command", lambda given, folder: asked_for.append(given) or [])
    monkeypatch.setattr(vllm_serve, "refuse_dtype", lambda policy, others: None)
    monkeypatch.setattr(vllm_serve, "_run", lambda command, environment: len(command))
    monkeypatch.setattr(vllm_serve, "require_vllm", lambda: None)
    assert vllm_serve.main(["--policy", str(tmp_path), "--weights", str(tmp_path / "w"), option, "2"]) == 0
    assert asked_for[0].tensor_parallel_size == 2


def test_a_server_for_recurrent_layers_does_not_guess(tmp_path):
    given = asked(tmp_path, "qwen3_5_text")
    with pytest.raises(ValueError, match="has recurrent layers.*num_speculative_tokens=0"):
        vllm_serve.serve_command(given, tmp_path / "draft")
    given.num_speculative_tokens = 0
    assert "speculative" not in " ".join(vllm_serve.serve_command(given, tmp_path / "draft"))
