"""Weights in files of bounded size, each taken while the next one is written."""

import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from spec_rollout.backends.vllm.handover import buckets, hand_over, shapes_of, total_bytes
from spec_rollout.backends.vllm.readback import LINEAR, probe

WEIGHTS = {
    "a": torch.arange(6.0).view(2, 3),
    "odd": torch.arange(3, dtype=torch.bfloat16),
    "b": torch.randn(4, 4).T,
    "large": torch.arange(100),
    "empty": torch.zeros(0, 2),
}


def test_files_are_bounded_and_hold_what_was_given(tmp_path):
    taken, found = [], {}

    def take(name):
        assert len(list(tmp_path.iterdir())) <= 2
        taken.append(load_file(tmp_path / name))
        found.update(taken[-1])

    shapes = shapes_of(WEIGHTS.items())
    with tqdm(disable=True) as bar:
        hand_over(WEIGHTS.items(), shapes, tmp_path, "policy-1", take, bar, size=64)
    assert [sorted(file) for file in taken] == [["a", "odd"], ["b"], ["large"], ["empty"]]
    assert all(torch.equal(found[name], weight) for name, weight in WEIGHTS.items())
    assert not list(tmp_path.iterdir())
    assert total_bytes(shapes) == 24 + 6 + 64 + 800
    assert [len(names) for names in buckets(shapes, 10**9)] == [5]


def test_a_weight_that_is_not_as_announced_ends_a_push(tmp_path):
    shapes = shapes_of(WEIGHTS.items())
    changed = {**WEIGHTS, "b": WEIGHTS["b"][:2]}
    with tqdm(disable=True) as bar, pytest.raises(RuntimeError, match="b came as torch.float32 .2, 4."):
        hand_over(changed.items(), shapes, tmp_path, "policy-1", lambda name: None, bar)


def test_a_file_that_is_refused_ends_a_push(tmp_path):
    def take(name):
        raise RuntimeError("refused")

    with tqdm(disable=True) as bar, pytest.raises(RuntimeError, match="refused"):
        hand_over(WEIGHTS.items(), shapes_of(WEIGHTS.items()), tmp_path, "policy-1", take, bar, size=1)


def test_a_folder_that_takes_no_file_is_named_with_a_remedy(tmp_path):
    """A folder that is full says the same; the other ranks hear of an OSError."""
    shapes, gone = shapes_of(WEIGHTS.items()), tmp_path / "gone"
    with tqdm(disable=True) as bar, pytest.raises(OSError, match=r"gone/policy-1-0.safetensors.*--weights DIR"):
        hand_over(WEIGHTS.items(), shapes, gone, "policy-1", lambda name: None, bar)


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_shard_answers_for_itself(part, replicas):
    """What is lost by the second of two workers is seen there, and not by the first."""
    rows = {"k": 4, "v": 4}
    tensors = {
        name: torch.randn(rows.get(name.split(".")[-2][0], 8), 8) for names in LINEAR.values() for name in names
    }
    place = [{"rank": rank, "ranks": 2, "kv_replicas": replicas} for rank in (0, 1)]
    before = [probe(tensors, own) for own in place]
    name = next(name for name in tensors if f".{part}." in name)
    half = torch.ones_like(tensors[name])
    if part in ("o_proj", "down_proj"):
        half[:, 4:] = 2
    else:
        half[len(half) // 2 :] = 2
    after = [probe({**tensors, name: tensors[name] * half}, own) for own in place]
    shared = part == "k_proj" and replicas == 2  # both hold those heads
    assert [a == b for a, b in zip(before, after, strict=True)] == [not shared, False]
