"""How a server was started, and what of that a trainer cannot live with."""

from __future__ import annotations

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
