"""Two processes on one policy: each samples its share on its own, and what is learned is that of plain decoding."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from trl.distributed import DistributedBackend

from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer, SpecRLOOConfig, SpecRLOOTrainer
from spec_rollout.training.gathering import refuse_partitioned
from tests.training.processes import torchrun

KINDS = {"ddp": [0, None, 2], "fsdp2": [0, 2, 2], "zero2": [2, None, 2], "zero3": [3, None, 2]}
"""ZeRO stage, FSDP version and processes that each of them must really have had."""


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_learn_what_plain_decoding_learns(tmp_path, kind):
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    first, second = torchrun("tests.training.ranks", kind, tmp_path)
    plain, speculative = ([rank[f"gamma {gamma}"] for rank in (first, second)] for gamma in (0, 2))
    assert {tuple(run["kind"]) for run in (*plain, *speculative)} == {tuple(KINDS[kind])}
    for rank in (0, 1):
        assert plain[rank]["seen"] == speculative[rank]["seen"]
    assert plain[0]["seen"] != plain[1]["seen"]
    assert len({run["weights"] for run in (*plain, *speculative)}) == 1
    assert plain[0]["steps"] != plain[1]["steps"]  # rows leave three slots at unlike times, and no rank waits
    logged = [entry for entry in speculative[0]["log"] if "speculative/acceptance_rate" in entry]
    assert logged and max(entry["speculative/mean_acceptance_length"] for entry in logged) > 1
    waits = [max(both) - sum(both) / 2 for both in zip(*(run["seconds"] for run in speculative), strict=True)]
    name = "speculative/rank_wait_seconds"
    waited = [entry[name] for entry in speculative[0]["log"] if name in entry]
    assert len(waits) == 2 and waited == pytest.approx(waits, rel=1e-3, abs=1e-5)
    assert speculative[0]["draft_version"] == speculative[1]["draft_version"] > 0
    assert speculative[0]["draft"] == speculative[1]["draft"] is not None
    head = Path(tmp_path, "gamma2", "checkpoint-2", "draft", "model.safetensors")
    assert all(weight.numel() for weight in load_file(head).values())
    if "tools" in first:
        assert_unlike_turns(first, second)


def assert_unlike_turns(first: dict, second: dict) -> None:
    """The policy stays whole through a tool loop in which one rank takes more turns than the other."""
    assert first["tools"]["turns"] > second["tools"]["turns"]
    assert first["tools"]["log"][0]["tools/call_frequency"] > 0


def setup(zero_stage=0, fsdp_version=None, gathers=True):
    backend = SimpleNamespace(is_zero3=zero_stage == 3, is_fsdp=fsdp_version is not None, fsdp_version=fsdp_version)
    accelerator = SimpleNamespace(distributed_type=DistributedType.MULTI_GPU)
    args = SimpleNamespace(ds3_gather_for_generation=gathers)
    return SimpleNamespace(_dist=backend, args=args, accelerator=accelerator)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [(setup(3, gathers=False), "ds3_gather_for_generation=False"), (setup(fsdp_version=1), "fsdp_version=1")],
)
def test_a_policy_in_pieces_is_refused(trainer, message):
    with pytest.raises(ValueError, match=message):
        refuse_partitioned(trainer)


@pytest.mark.parametrize(("sleeps", "message"), [(True, "vllm_enable_sleep_mode=True .*'server'"), (False, None)])
@pytest.mark.parametrize("trainer", [setup(3, gathers=False), setup(fsdp_version=2)])
def test_vllm_takes_a_policy_in_pieces_awake(trainer, sleeps, message):
    gathers = trainer.args.ds3_gather_for_generation
    trainer.args = SimpleNamespace(
        ds3_gather_for_generation=gathers, rollout_backend="vllm", vllm_enable_sleep_mode=sleeps
    )
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        refuse_partitioned(trainer)


def test_fsdp_that_accelerate_leaves_out_is_refused(monkeypatch):
    trainer = setup()
    trainer.accelerator.distributed_type = DistributedType.MULTI_CPU
    refuse_partitioned(trainer)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP was asked for.*ddp.yaml"):
        refuse_partitioned(trainer)


@pytest.mark.parametrize("trainer", [setup(), setup(2, gathers=False), setup(3), setup(fsdp_version=2)])
def test_a_whole_policy_is_accepted(trainer):
    refuse_partitioned(trainer)


@pytest.mark.parametrize(
    ("trainer_class", "config_class"), [(SpecGRPOTrainer, SpecGRPOConfig), (SpecRLOOTrainer, SpecRLOOConfig)]
)
def test_the_trainers_refuse_it_before_they_run(make_trainer, monkeypatch, trainer_class, config_class):
    monkeypatch.setattr(DistributedBackend, "is_zero3", True)
    with pytest.raises(ValueError, match="ds3_gather_for_generation=False"):
        make_trainer(trainer_class, config_class, ds3_gather_for_generation=False)
