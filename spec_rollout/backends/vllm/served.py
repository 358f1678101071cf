"""How a server was started, and what of that a trainer cannot live with."""

from __future__ import annotations

from typing import Any

from spec_rollout.backends.vllm.steady import guesses_steadily, refuse_crowded
from spec_rollout.config import SpecConfig


def refuse_lossy(url: str, config: dict) -> None:
    """
    Raises:
        ValueError: the server was started so that its samples do not have the policy's law, or its log-probs are
            not those that the samples were drawn with.
    """
    speculative = config.get("speculative_config") or {}
    for name, value, served in (
        ("rejection_sample_method", speculative.get("rejection_sample_method", "standard"), "standard"),
        ("logprobs_mode", config["model_config"]["logprobs_mode"], "processed_logprobs"),
    ):
        if value != served:
            raise ValueError(f"The vLLM server at {url} runs with {name}={value!r}: it must be {served!r}.")


def refuse_other_guesses(url: str, speculative: dict, config: SpecConfig) -> None:
    """
    Raises:
        ValueError: the server was not started with as many guesses as `config` asks for, which it cannot change.
    """
    most, asked = speculative.get("num_speculative_tokens", 0), config.num_speculative_tokens
    schedule = speculative.get("num_speculative_tokens_per_batch_size") or [[1, 1, most]]
    numbers = sorted({part[-1] for part in schedule})
    if asked is None:
        honoured = 0 < most <= config.max_num_speculative_tokens
        bound = f"at least 1 and at most max_num_speculative_tokens={config.max_num_speculative_tokens}"
    else:
        honoured, bound = numbers == [asked], f"{asked} in each step"
    if not honoured:
        found = " or ".join(map(str, numbers))
        raise ValueError(
            f"num_speculative_tokens={asked} asks for {bound}, but the vLLM server at {url} was started to "
            f"guess {found}: give the trainer and `spec-rollout serve` the same number, 0 for plain decoding."
        )


def refuse_other_draft(url: str, served: dict, wanted: dict[str, Any] | None) -> None:
    """
    Args:
        served: the server's configuration.
        wanted: the speculative_config that it should have been started with; None where that is not told.

    Raises:
        ValueError: the server guesses with another kind of draft, or loses the states of recurrent layers.
    """
    speculative = served.get("speculative_config")
    if wanted is None or not speculative:
        return
    if speculative["method"] != wanted["method"]:
        raise ValueError(
            f"The vLLM server at {url} guesses by method {speculative['method']!r}, the trainer pushes a head for "
            f"{wanted['method']!r}: give the trainer (draft_head) and `spec-rollout serve` (--draft_head) the same, "
            "mtp or eagle3, and the same policy."
        )
    caches = served["cache_config"]["enable_prefix_caching"]
    if guesses_steadily(wanted) and (caches or not guesses_steadily(speculative)):
        what = "caches prefixes" if caches else "changes the number of guesses from step to step"
        raise ValueError(
            f"The vLLM server at {url} {what}, by which it loses the states of the policy's recurrent layers while it "
            "guesses: start it by `spec-rollout serve`, without --enable-prefix-caching."
        )
    if guesses_steadily(wanted):
        step = served["scheduler_config"]
        refuse_crowded(speculative, step["max_num_seqs"], step["max_num_batched_tokens"])
