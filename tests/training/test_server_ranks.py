"""Two trainer processes on one vLLM server, with the policy whole or in pieces, and a server in two pieces itself."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.backends.vllm.process import Process
from tests.backends.vllm.tiny import SIZES, needs_vllm
from tests.training.conftest import build_tokenizer
from tests.training.processes import QUIET, ROOT, torchrun

pytestmark = needs_vllm
RECIPE = ROOT / "recipes" / "arithmetic_grpo_vllm_ranks.yaml"

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
def process(policy, tmp_path_factory):
    """A server that all kinds use in turn."""
    process = Process(policy, tmp_path_factory.mktemp("server") / "log", "--num_speculative_tokens", "2")
    yield process
    process.kill()


@pytest.fixture(scope="module")
def run(process, policy, tmp_path_factory):
    """What the ranks of one kind saw; each is run once."""
    runs = {}

    def once(kind: str) -> list[dict]:
        if kind not in runs:
            runs[kind] = train(kind, process, policy, tmp_path_factory.mktemp(kind))
        return runs[kind]

    return once


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


def test_rloo(run):
    served, plain = run("ddp+rloo"), run("ddp+rloo+embedded")
    assert [rank["seen"] for rank in served] == [rank["seen"] for rank in plain]
    check(served, KINDS["ddp"], served)


@pytest.mark.parametrize("kind", ["fsdp2", "zero2", "zero3"])
def test_an_engine_on_each_rank(run, kind):
    if kind.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    check(run(f"{kind}+colocate"), KINDS[kind], run("ddp"), shared=False)


def test_a_server_of_two_workers_serves_two_ranks(run, policy, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = ("--num_speculative_tokens", "2", "--tensor_parallel_size", "2")
    process = Process(policy, tmp_path / "log", *options)
    try:
        check(train("ddp", process, policy, tmp_path), KINDS["ddp"], run("ddp"))
    finally:
        process.kill()


def test_the_command_of_the_recipe(process, policy, tmp_path):
    """As it stands there, on a CPU."""
    line = "--config_file recipes/accelerate/ddp.yaml --num_processes 2 --mixed_precision no --main_process_port 0 "
    line += "trainers/grpo.py --config recipes/arithmetic_grpo_vllm_ranks.yaml --use_cpu --max_steps 2 "
    line += "--per_device_train_batch_size 4 --num_generations 4 --max_completion_length 8 --dataset_size 8 "
    line += f"--model_name_or_path {policy} --vllm_server_base_url {process.url} --output_dir {tmp_path}"
    assert "--config_file recipes/accelerate/ddp.yaml --num_processes 2 --mixed_precision no" in RECIPE.read_text()
    process.wait()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    environment = inherited | QUIET | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "accelerate.commands.launch", *line.split()]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    *steps, summary = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert len(steps) == 2 and all(step["sampling/sampling_logp_difference/max"] < 1e-3 for step in steps)
    assert summary["train_samples_per_second"] * summary["train_runtime"] == pytest.approx(2 * 2 * 4, rel=0.01)


def check(ranks: list[dict], kind: list, whole: list[dict], shared: bool = True) -> None:
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
    # one server counts for all ranks
    assert (ranks[0]["acceptance_length"] == ranks[1]["acceptance_length"]) == shared
