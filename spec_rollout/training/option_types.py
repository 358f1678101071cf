"""The types of options: a string where a number or a truth value belongs would be true, or fail without a name."""

from __future__ import annotations

from dataclasses import fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from huggingface_hub.dataclasses import type_validator

from spec_rollout.config import SpecConfig

SAMPLING = {
    "max_completion_length": int | None,
    "temperature": float | int,
    "top_k": int | None,
    "top_p": float | int,
    "min_p": float | int | None,
    "repetition_penalty": float | int,
}
"""TRL's options that become sampling parameters."""


def check_types(config: Any) -> None:
    """Refuse options of a wrong type in a trainer's configuration: all of `SpecConfig` and those of sampling, and of
    the rest, whose annotations are not strict, strings where numbers or truth values are expected.

    Raises:
        ValueError: naming the option, its value and what it should be.
    """
    hints = get_type_hints(type(config))
    strict = {option.name for option in fields(SpecConfig)} & hints.keys()
    for option in fields(config):
        name, value = option.name, getattr(config, option.name)
        kinds = set(get_args(hints[name]) or (hints[name],))
        plain = kinds <= {bool, int, float, NoneType}
        if name in SAMPLING:
            check_type(name, value, SAMPLING[name])
        elif name in strict or (plain and isinstance(value, str)):
            check_type(name, value, hints[name] | int if float in kinds else hints[name])


def check_type(name: str, value: Any, kind: Any) -> None:
    """
    Raises:
        ValueError: `value` is not of the type, or union of types, `kind`.
    """
    try:
        type_validator(name, value, kind)
    except TypeError as error:
        wanted = " or ".join(WORDS.get(part, part.__name__) for part in get_args(kind) or (kind,))
        raise ValueError(f"{name}={value!r} is of type {type(value).__name__}: give {wanted}.") from error


WORDS = {bool: "True or False", int: "an integer", float: "a number", str: "a string", NoneType: "None"}
