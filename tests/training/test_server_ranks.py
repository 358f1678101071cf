"""Two trainer processes on one vLLM server, with the policy whole or in pieces, and a server in two pieces itself."""

from importlib.util import find_spec

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.backends.vllm.process import Process
from tests.backends.vllm.tiny import SIZES, needs_vllm
from tests.training.conftest import build_tokenizer
from tests.training.processes import torchrun

pytestmark = needs_vllm

KINDS = {"ddp": [0, None, 2], "fsdp2": [0, 2, 2], "zero2": [2, None, 2], "zero3": [3, None, 2]}
"""ZeRO stage, FSDP version and processes that each of them must really have had."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A folder with a random policy of two heads that share their keys."""
    folder, tokenizer = tmp_path_factory.mktemp("policy"), build_tokenizer()
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    shape = {**SIZES, "vocab_size": len(tokenizer), "intermediate_size": 64, "initializer_range": 0.3, **ends}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(policy, tmp_path_factory):
    """What the ranks of one kind saw of a server that all kinds use in turn; each is run once."""
    process = Process(policy, tmp_path_factory.mktemp("server") / "log", "--num_speculative_tokens", "2")
    runs = {}

    def once(kind: str) -> list[dict]:
        if kind not in runs:
            runs[kind] = train(kind, process, policy, tmp_path_factory.mktemp(kind))
        return runs[kind]

    yield once
    process.kill()


def train(kind, process, policy, folder):
    process.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERVER", process.url)
        patch.setenv("POLICY", str(policy))
        return [rank["digits"] for rank in torchrun("tests.training.server_ranks", kind, folder)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_share_a_server(run, kind):
    if kind.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    check(run(kind), KINDS[kind], run("ddp"))


def test_a_server_of_two_workers_serves_two_ranks(run, policy, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = ("--num_speculative_tokens", "2", "--tensor_parallel_size", "2")
    process = Process(policy, tmp_path / "log", *options)
    try:
        check(train("ddp", process, policy, tmp_path), KINDS["ddp"], run("ddp"))
    finally:
        process.kill()


def check(ranks: list[dict], kind: list, whole: list[dict]) -> None:
    for own, expected in zip(ranks, whole, strict=True):
        assert own["kind"] == kind
        assert own["seen"] == expected["seen"]  # coupled: keyed by seed, rank, step and call
        assert own["held"] == [[True, None]] * 6  # five steps, and the policy after the last
        assert own["greedy"] == own["expected"]
        logged = [entry for entry in own["log"] if "reward" in entry]
        assert len(logged) == 5
        assert all(entry["sampling/sampling_logp_difference/max"] < 1e-3 for entry in logged)
        assert [entry["speculative/draft_version"] for entry in logged] == [1, 2, 3, 4, 5]
        assert all(entry["speculative/draft_healthy"] == 1 for entry in logged)
        assert own["acceptance_length"] > 1.05
    assert ranks[0]["seen"] != ranks[1]["seen"]
    assert ranks[0]["acceptance_length"] == ranks[1]["acceptance_length"]
