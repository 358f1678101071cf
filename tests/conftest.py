"""A random policy with the arithmetic task's tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from spec_rollout.tasks.reference_policy import Recipe, make_model, make_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """As `make_reference_policy` lays it out."""
    path = tmp_path_factory.mktemp("made") / "policy"
    tokenizer = make_tokenizer()
    make_model(Recipe(2, 64, 2, 64, 0, 0, 0.0), tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
