"""A vLLM server that takes our weights: started by `spec-rollout serve`, driven over HTTP.

Weights travel as safetensors files in a folder that the trainer and the server both see, on any device.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from spec_rollout.backends.vllm.connection import HINT, Connection
from spec_rollout.backends.vllm.engine import EngineRestarted, PolicyWeights, completion, sampling_options
from spec_rollout.backends.vllm.keyed_batch import keyed
from spec_rollout.backends.vllm.steps import Guesses, step_stats
from spec_rollout.config import SpecConfig
from spec_rollout.records import Completion, Controller, SamplingParams, StepStats

LONGEST_S = 3600.0
"""A rollout or a push that takes longer than this hangs."""
COUNTERS = "vllm:spec_decode_num_"


class Server(Connection):
    """A `VLLMEngine` behind a server's address, for one process: its counters of guesses are everybody's.

    Args:
        url: such as http://127.0.0.1:8000.
        policy: the live policy.
        folder: where weights are handed over.
        config: the numbers of guesses that are asked for.
        timeout: seconds to wait for the server, at the start, when it is lost, and for its short answers.

    Raises:
        ConnectionError: there is no server, or one that does not take our weights.
        ValueError: the server samples lossily, or guesses other numbers of tokens.
    """

    live_schedule = False

    def __init__(
        self,
        url: str,
        policy: PolicyWeights,
        folder: str | Path,
        config: SpecConfig,
        timeout: float = 240.0,
    ):
        super().__init__(url, timeout)
        self.policy, self.folder = policy, Path(folder)
        self.controller: Controller | None = None
        self._steps: list[StepStats] = []
        self._held: list[int] | None = None
        self.verification = config.verification
        self.model = self._request("/v1/models")["data"][0]["id"]
        self.versions()
        served = self._request("/server_info?config_format=json")["vllm_config"]
        self._refuse_lossy(served)
        self.speculates = bool(served.get("speculative_config"))
        self._refuse_other_guesses(served.get("speculative_config") or {}, config)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        limits: Sequence[int] | None = None,
        keys: Sequence[tuple[int, int]] | None = None,
    ) -> list[Completion]:
        before, began = self._counters(), time.perf_counter()
        bounds = list(limits or [params.max_new_tokens] * len(prompts))
        groups = {bound: [i for i, b in enumerate(bounds) if b == bound] for bound in bounds}
        drawn: dict[int, Completion] = {}

        def draw(item: tuple[int, list[int]]) -> None:
            bound, indices = item
            own = [keys[i] for i in indices] if keys else []
            rows = self._draw([list(prompts[i]) for i in indices], params, bound, own)
            drawn.update(zip(indices, rows, strict=True))

        with ThreadPoolExecutor(max_workers=max(1, len(groups))) as pool:
            list(pool.map(draw, groups.items()))
        if self.versions() != self._held:
            self._lost("It was restarted during a rollout.")
        seconds = time.perf_counter() - began
        completions = [drawn[i] for i in range(len(prompts))]
        self._account(self._counters() - before, sum(len(c.token_ids) for c in completions), seconds)
        return completions

    def load(self, draft: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.folder) as folder:
            files = [_write(Path(folder, "policy.safetensors"), self.policy())]
            files.append(None if draft is None else _write(Path(folder, "draft.safetensors"), draft))
            self._call("live_load", *files, version, seconds=LONGEST_S)
        # Behind the weights: a server that was restarted in between is known by those that it does not hold.
        self.verification = self._call("live_verify", self.verification)
        self._request("/reset_prefix_cache", {})
        self._held = self.versions()

    def versions(self) -> list[int]:
        try:
            return self._call("live_versions")
        except EngineRestarted:
            raise
        except RuntimeError as error:
            raise ConnectionError(f"The server at {self.url} cannot take weights ({error}): {HINT}.") from error

    def draft_probe(self) -> dict[str, float]:
        return self._call("live_probe")

    def near_ties(self) -> int:
        try:
            return int(self._call("live_near_ties"))
        except EngineRestarted:  # the next push notices
            return 0

    def control(self, controller: Controller) -> None:
        self.controller = controller

    def take_steps(self) -> tuple[list[StepStats], float]:
        taken, self._steps = self._steps, []
        return taken, 0.0

    def sleep(self) -> None:
        """It has its device to itself."""

    def _refuse_lossy(self, config: dict) -> None:
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
                raise ValueError(f"The vLLM server at {self.url} runs with {name}={value!r}: it must be {served!r}.")

    def _refuse_other_guesses(self, speculative: dict, config: SpecConfig) -> None:
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
                f"num_speculative_tokens={asked} asks for {bound}, but the vLLM server at {self.url} was started to "
                f"guess {found}: give the trainer and `spec-rollout serve` the same number, 0 for plain decoding."
            )

    def _draw(
        self, prompts: list[list[int]], params: SamplingParams, bound: int, keys: Sequence[tuple[int, int]] = ()
    ) -> list[Completion]:
        coupled = self.verification == "coupled"
        options = sampling_options(params, bound, self.speculates, coupled)
        if coupled:
            options["vllm_xargs"] = keyed(keys, params.min_p)
        body = {"model": self.model, "prompt": prompts, "return_token_ids": True, **options}
        choices = self._request("/v1/completions", body, LONGEST_S)["choices"]
        return [
            completion(c["token_ids"], c["logprobs"]["token_logprobs"], c["finish_reason"], params.eos_token_ids)
            for c in sorted(choices, key=lambda c: c["index"])
        ]

    def _account(self, counted: Counter, emitted: int, seconds: float) -> None:
        """One record for the rows that guessed, one for the others: the server does not tell single steps."""
        accepted = [counted[f"accepted_tokens_per_pos_total:{i}"] for i in range(64)]
        guesses = Guesses(
            counted["drafts_total"], counted["draft_tokens_total"], counted["accepted_tokens_total"], accepted
        )
        guessed = min(emitted, guesses.num_drafts + guesses.num_accepted_tokens)
        for size, found in ((guessed, guesses), (emitted - guessed, None)):
            if size:
                step = step_stats(size, found)
                step.verify_s = seconds * size / emitted
                self._steps.append(step)
                if self.controller is not None:
                    self.controller.observe(step)

    def _counters(self) -> Counter:
        """vLLM's counters of guesses, by the end of their names and the position."""
        counts: Counter = Counter()
        for line in self._request("/metrics").splitlines():
            if line.startswith(COUNTERS):
                name, value = line.removeprefix(COUNTERS).rsplit(" ", 1)
                name, _, labels = name.partition("{")
                place = labels.partition('position="')[2].partition('"')[0]
                counts[f"{name}:{place}" if place else name] += int(float(value))
        return counts

    def _call(self, method: str, *arguments: Any, seconds: float | None = None) -> Any:
        """One of the methods of `LiveWeights`."""
        reply = self._request("/collective_rpc", {"method": method, "args": list(arguments)}, seconds)
        return reply["results"][0] if reply else None


def _write(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> str:
    # Copies: adapters that are merged into the live weights on the way here are unmerged before the file is written.
    save_file({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors}, path)
    return str(path.resolve())
