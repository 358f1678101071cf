"""Options of `spec-rollout serve` that are refused before vLLM starts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from spec_rollout.backends.vllm.key import HOW, require_key, server_key
from spec_rollout.backends.vllm.steady import refuse_precision


def refuse_out_of_range(given: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: a number that vLLM would refuse later, or less clearly.
    """
    bounds = (
        ("max_slots", given.max_slots >= 1, "at least 1"),
        ("tensor_parallel_size", given.tensor_parallel_size >= 1, "at least 1"),
        ("port", 1 <= given.port <= 65535, "within 1 and 65535"),
    )
    for name, holds, bound in bounds:
        if not holds:
            raise ValueError(f"--{name} {getattr(given, name)} is out of range: it must be {bound}.")


def refuse_insecure(host: str, others: Sequence[str]) -> None:
    """
    Raises:
        ValueError: others could replace the server's weights, or read its key.
    """
    require_key(host, server_key())
    names = {option.partition("=")[0].replace("_", "-") for option in others}
    if "--api-key" in names:
        raise ValueError(f"--api-key can be read off the process list, and covers /v1 only: {HOW}.")
    if "VLLM_API_KEY" in os.environ:
        raise ValueError(f"VLLM_API_KEY covers /v1 only: unset it, and {HOW}.")
    if names & {"--uds", "--middleware"}:
        raise ValueError("--uds and --middleware are not served: they would stand beside the server's own guard.")


def refuse_several_engines(others: Sequence[str]) -> None:
    """
    Raises:
        ValueError: `others` ask for several engines, of which vLLM passes on the first one's replies only: a push that
            another one refused would go unseen. Layers on several devices in a row were not tested.
    """
    names = [option.partition("=")[0].replace("_", "-") for option in others]
    found = [n for n in names if n in ("-dp", "-pp") or n.startswith(("--data-parallel", "--pipeline-parallel"))]
    if found:
        raise ValueError(
            f"{found[0]} is refused: that weights reach every worker is tested with --tensor_parallel_size alone. "
            "Leave it out, and share layers by that."
        )


def refuse_cached_prefixes(command: Sequence[str], others: Sequence[str]) -> None:
    """
    Raises:
        ValueError: `others` ask for prefix caching, which our own options in `command` turn off.
    """
    names = {option.partition("=")[0].replace("_", "-") for option in others}
    if "--no-enable-prefix-caching" in command and "--enable-prefix-caching" in names:
        raise ValueError(
            "--enable-prefix-caching is refused: vLLM loses the states of the policy's recurrent layers where it "
            "guesses with an MTP head and caches prefixes. Leave it out, or guess nothing (--num_speculative_tokens "
            "0)."
        )


def refuse_dtype(policy: str, others: Sequence[str]) -> None:
    """
    Raises:
        ValueError: as `refuse_precision`, by the --dtype in `others`, or that of the policy's checkpoint.
    """
    import torch
    from transformers import AutoConfig
    from vllm.platforms import current_platform

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dtype", default="auto")
    asked = parser.parse_known_args(others)[0].dtype
    text = AutoConfig.from_pretrained(policy).get_text_config(decoder=True)
    if asked == "auto":  # vLLM takes float32 down by itself
        asked = "float16" if text.dtype == torch.float16 else "bfloat16"
    refuse_precision(text.model_type, asked, current_platform.is_cpu())
