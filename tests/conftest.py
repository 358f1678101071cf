"""A random policy with the arithmetic task's tokenizer."""

from __future__ import annotations

import gc
import importlib
from pathlib import Path

import pytest
import torch

import tests.tiny
from spec_rollout.engine.lean import products
from spec_rollout.tasks.reference_policy import Recipe, make_model, make_tokenizer
from tests.devices import follow


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tiny policies lie: cpu, cuda, or apart (tests/apart.py)")


def pytest_configure(config):
    device = config.getoption("--device")
    if device == "apart":
        importlib.import_module("tests.apart")
    tests.tiny.DEVICE = torch.device(device)
    if device != "cpu":
        follow(tests.tiny.DEVICE)


def pytest_collection_modifyitems(config, items):
    """Elsewhere than on a CPU only the tests run that were made for it."""
    if config.getoption("--device") != "cpu":
        apart = [item for item in items if item.get_closest_marker("any_device") is None]
        config.hook.pytest_deselected(items=apart)
        items[:] = [item for item in items if item.get_closest_marker("any_device")]


def pytest_collection_finish():
    """What is imported by now stays: no collection of garbage, as at the end of each training, need look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def columns(request, monkeypatch) -> bool:
    """Lean passes take tokens as columns, or as rows where a test says so, whatever is faster on this machine."""
    chosen = getattr(request, "param", True)
    monkeypatch.setattr(products, "_found", dict.fromkeys(range(1, 257), chosen))
    return chosen


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """As `make_reference_policy` lays it out."""
    path = tmp_path_factory.mktemp("made") / "policy"
    tokenizer = make_tokenizer()
    make_model(Recipe(2, 64, 2, 64, 0, 0, 0.0), tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
