"""Every knob of the sampler, in one dataclass."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_type_hints

from huggingface_hub.dataclasses import type_validator

VERIFICATIONS = ["coupled", "rejection"]
BACKENDS = ("embedded", "vllm")
HEADS = ("auto", "eagle3", "mtp")
COMPILE = ("auto", "true", "false")
MOST_GIB = 10**6


def cache_folder(given: str | None = None) -> Path:
    """Where what was measured or compiled is kept: `given`, or `spec_rollout` in $XDG_CACHE_HOME or ~/.cache."""
    base = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "spec_rollout"
    return base.expanduser()


def check_types(record: object, kind: type) -> None:
    """Check the fields of `record` that the dataclass `kind` declares against its annotations; an int is a float too.

    Raises:
        ValueError: naming the field, its value and the type it must have.
    """
    hints = get_type_hints(kind)
    for name in (entry.name for entry in fields(kind)):
        value = getattr(record, name)
        checked = float(value) if type(value) is int and hints[name] in (float, float | None) else value
        try:
            type_validator(name, checked, hints[name])
        except TypeError as error:
            wanted = getattr(hints[name], "__name__", hints[name])
            raise ValueError(f"{name}={value!r} is of the wrong type: it must be {wanted}.") from error


@dataclass
class SpecConfig:
    """Options of speculative rollouts.

    Raises:
        ValueError: a value out of its range, naming the value, the bound and the remedy.
        TypeError: an unknown option.
    """

    rollout_backend: str = field(
        default="embedded",
        metadata={
            "help": "Who samples: `embedded`, an engine in the trainer's process that is exact token by token, or "
            "`vllm`, by the trainer's options that begin with `vllm_`.",
            "choices": list(BACKENDS),
        },
    )
    num_speculative_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that the draft guesses per step. `None` adapts it to the batch size by measured goodput; "
            "0 is plain decoding."
        },
    )
    max_num_speculative_tokens: int = field(
        default=7, metadata={"help": "Upper bound of the adapted number of guessed tokens."}
    )
    verification: str | None = field(
        default=None,
        metadata={
            "help": "How guesses are judged: `coupled` compares them with the target's own samples, the same at any "
            "number of guesses; `rejection` is classical rejection sampling, lossless in law only. `None` is "
            "`coupled` wherever that was tested: in the embedded engine, and in vLLM on a CPU.",
            "choices": VERIFICATIONS,
        },
    )
    max_slots: int = field(
        default=64,
        metadata={"help": "Completions decoded at the same time; further ones wait until a slot is free."},
    )
    max_cache_gib: float | None = field(
        default=None,
        metadata={
            "help": "GiB that keys and values of all completions may take at one time, by the embedded engine; rows "
            "that do not fit wait, and the tokens are the same. `None` is half of what is free at the first rollout."
        },
    )
    draft_model_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a draft head to start from, or of a causal language model with the policy's "
            "vocabulary, which guesses as it is. `None` starts cold and learns from the rollouts."
        },
    )
    draft_head: str = field(
        default="auto",
        metadata={
            "help": "The draft: `mtp`, the multi-token prediction head in the policy's own checkpoint, `eagle3`, one "
            "that is made and learns here, or `auto`, the first where the checkpoint has one that the sampler runs.",
            "choices": list(HEADS),
        },
    )
    draft_ngrams: bool = field(
        default=True,
        metadata={
            "help": "Guess from what followed the same tokens in earlier rollouts, until the draft head is predicted "
            "to be faster (by the embedded engine only)."
        },
    )
    draft_quantized: bool = field(
        default=False,
        metadata={
            "help": "Guess with a copy of the policy in 8 bit, made anew after each update, until the draft head is "
            "predicted to be faster (by the embedded engine, on a CPU)."
        },
    )
    draft_refresh: bool = field(
        default=True, metadata={"help": "Train the draft head on the rollouts after each generation phase."}
    )
    draft_overhead: float = field(
        default=0.05,
        metadata={
            "help": "Most of the run's time that training the draft may take, as a share. Less is taken where it does "
            "not pay, more at first, where it is paid back later."
        },
    )
    draft_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the draft head. `None` follows its hidden size."}
    )
    max_feature_tokens: int = field(
        default=32768,
        metadata={"help": "Tokens whose target features are kept for training the draft head; bounds its memory."},
    )
    calibration_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps measured pass times and compiled passes between runs. `None` is "
            "`~/.cache/spec_rollout`."
        },
    )
    compile_passes: str = field(
        default="false",
        metadata={
            "help": "Run the embedded engine's passes through torch's compiler, on a GPU as CUDA graphs: `true` from "
            "the first rollout on, which waits for it, `auto` once it should pay, without a wait, or `false`. On a "
            "CPU it needs a C++ compiler.",
            "choices": list(COMPILE),
        },
    )
    profile_rollouts: bool = field(
        default=False,
        metadata={
            "help": "Record every rollout in `rollouts/` of the output directory, for `spec-rollout report` and "
            "`spec-rollout simulate`."
        },
    )

    def __post_init__(self):
        if isinstance(self.compile_passes, bool):
            self.compile_passes = str(self.compile_passes).lower()
        check_types(self, SpecConfig)
        gamma = self.num_speculative_tokens
        if gamma is not None and gamma < 0:
            raise ValueError(
                f"num_speculative_tokens={gamma} is negative: give 0 for plain decoding, a positive number to fix it, "
                "or None to adapt it."
            )
        ngrams = self.draft_ngrams and self.rollout_backend == "embedded"
        models = self.draft_quantized or self.draft_model_path
        if gamma != 0 and not (ngrams or self.draft_refresh or models):
            raise ValueError(
                "draft_refresh=False without draft_model_path leaves nothing that could guess with draft_ngrams=False "
                "or on vLLM: give a head, let it learn, or ask for plain decoding with num_speculative_tokens=0."
            )
        if self.verification not in (None, *VERIFICATIONS):
            raise ValueError(
                f"verification={self.verification!r} is unknown: give 'coupled' (the same tokens as plain decoding) "
                "or 'rejection' (the same law)."
            )
        if self.draft_head == "mtp" and self.compile_passes == "true":
            raise ValueError("draft_head='mtp' does not go with compile_passes=True: leave one at its default.")
        if self.draft_quantized and (self.rollout_backend == "vllm" or self.draft_model_path):
            other = "draft_model_path" if self.draft_model_path else "rollout_backend='vllm'"
            raise ValueError(f"draft_quantized=True does not go with {other}: leave one of the two at its default.")
        if self.rollout_backend == "vllm":
            self._refuse_what_vllm_does_itself()
        bounds = (
            ("rollout_backend", self.rollout_backend in BACKENDS, f"one of {', '.join(BACKENDS)}"),
            ("compile_passes", self.compile_passes in COMPILE, f"one of {', '.join(COMPILE)}"),
            ("draft_head", self.draft_head in HEADS, f"one of {', '.join(HEADS)}"),
            ("max_num_speculative_tokens", self.max_num_speculative_tokens >= 1, "at least 1"),
            (
                "max_cache_gib",
                self.max_cache_gib is None or 0 < self.max_cache_gib <= MOST_GIB,
                f"above 0 and at most {MOST_GIB}, or None",
            ),
            ("max_slots", self.max_slots >= 1, "at least 1"),
            (
                "draft_learning_rate",
                self.draft_learning_rate is None or 0 < self.draft_learning_rate < math.inf,
                "above 0 and finite, or None",
            ),
            (
                "draft_overhead",
                0 < self.draft_overhead < math.inf,
                "above 0 and finite; draft_refresh=False turns training off",
            ),
            ("max_feature_tokens", self.max_feature_tokens >= 0, "0 or more"),
        )
        for name, holds, bound in bounds:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} is out of range: it must be {bound}.")

    def _refuse_what_vllm_does_itself(self) -> None:
        if self.max_cache_gib is not None:
            raise ValueError(
                f"max_cache_gib={self.max_cache_gib} needs rollout_backend='embedded': vLLM bounds its own cache, by "
                "vllm_gpu_memory_utilization, or VLLM_CPU_KVCACHE_SPACE on a CPU."
            )
        if self.compile_passes == "true":
            raise ValueError("compile_passes=True needs rollout_backend='embedded': vLLM compiles its own passes.")
        if self.profile_rollouts:
            raise ValueError("profile_rollouts=True needs rollout_backend='embedded': vLLM's steps are not recorded.")

    @property
    def widest(self) -> int:
        """The most tokens that a step may guess."""
        return self.max_num_speculative_tokens if self.num_speculative_tokens is None else self.num_speculative_tokens
