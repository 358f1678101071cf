"""A vLLM server that takes our weights: started by `spec-rollout serve`, driven over HTTP.

Weights travel as safetensors files in a folder that the trainer and the server both see, on any device.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from safetensors.torch import save_file
from torch import Tensor

from spec_rollout.backends.vllm_engine import EngineRestarted, PolicyWeights, completion, sampling_options
from spec_rollout.backends.vllm_steps import Guesses, step_stats
from spec_rollout.records import Completion, Controller, SamplingParams, StepStats

RETRY_S = 2.0
COUNTERS = "vllm:spec_decode_num_"
HINT = "start one with `spec-rollout serve`, and give its address by vllm_server_base_url, or _host and _port"


class Server:
    """A `VLLMEngine` behind a server's address.

    Args:
        url: such as http://127.0.0.1:8000.
        policy: the live policy.
        folder: where weights are handed over.
        timeout: seconds to wait for the server, at the start and when it is lost.
        main: whether this rank hands over the weights; all ranks draw.
        wait: waits for the other ranks; None if there are none.

    Raises:
        ConnectionError: there is no server, or one that does not take our weights.
        ValueError: the server samples lossily.
    """

    live_schedule = False

    def __init__(
        self,
        url: str,
        policy: PolicyWeights,
        folder: str | Path,
        timeout: float = 240.0,
        main: bool = True,
        wait: Callable[[], None] | None = None,
    ):
        self.url, self.policy, self.folder, self.timeout = url.rstrip("/"), policy, Path(folder), timeout
        self.main, self.wait = main, wait
        self.controller: Controller | None = None
        self._steps: list[StepStats] = []
        self._held: list[int] | None = None
        self._await_health()
        self.model = self._request("/v1/models")["data"][0]["id"]
        self.versions()
        self._refuse_lossy(self._request("/server_info?config_format=json")["vllm_config"])

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, limits: Sequence[int] | None = None
    ) -> list[Completion]:
        before, began = self._counters(), time.perf_counter()
        bounds = list(limits or [params.max_new_tokens] * len(prompts))
        groups = {bound: [i for i, b in enumerate(bounds) if b == bound] for bound in bounds}
        drawn: dict[int, Completion] = {}

        def draw(item: tuple[int, list[int]]) -> None:
            bound, indices = item
            rows = self._draw([list(prompts[i]) for i in indices], params, bound)
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
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.policy() if self.main}
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=self.folder) as folder:
                files = [_write(Path(folder, "policy.safetensors"), tensors)]
                files.append(None if draft is None else _write(Path(folder, "draft.safetensors"), dict(draft)))
                self._call("live_load", *files, version)
            self._request("/reset_prefix_cache", {})
        if self.wait is not None:
            self.wait()
        self._held = self.versions()

    def versions(self) -> list[int]:
        try:
            return self._call("live_versions")
        except RuntimeError as error:
            raise ConnectionError(f"The server at {self.url} cannot take weights ({error}): {HINT}.") from error

    def draft_probe(self) -> dict[str, float]:
        return self._call("live_probe")

    def control(self, controller: Controller) -> None:
        self.controller = controller

    def take_steps(self) -> tuple[list[StepStats], float]:
        taken, self._steps = self._steps, []
        return taken, 0.0

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

    def _draw(self, prompts: list[list[int]], params: SamplingParams, bound: int) -> list[Completion]:
        options = sampling_options(params, bound, speculates=True)
        body = {"model": self.model, "prompt": prompts, "return_token_ids": True, **options}
        choices = self._request("/v1/completions", body)["choices"]
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

    def _call(self, method: str, *arguments: Any) -> Any:
        """One of the methods of `LiveWeights`."""
        reply = self._request("/collective_rpc", {"method": method, "args": list(arguments)})
        return reply["results"][0] if reply else None

    def _request(self, path: str, body: dict | None = None) -> Any:
        """The decoded reply.

        Raises:
            EngineRestarted: the server was lost meanwhile, and is there again.
            ConnectionError: it was lost and did not come back in time.
            RuntimeError: it refused.
        """
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urlopen(request) as reply:
                text = reply.read().decode()
        except HTTPError as error:
            raise RuntimeError(f"{path}: status {error.code}, {error.read().decode()[:300]}") from error
        except (OSError, HTTPException) as error:
            self._await_health()
            self._lost(f"It was lost ({error!r}).")
        return json.loads(text) if text.startswith(("{", "[")) else text

    def _lost(self, what: str) -> None:
        message = f"The vLLM server at {self.url}: {what}"
        if self.wait is not None:  # the other ranks do not know
            raise ConnectionError(f"{message} With several ranks the run must be resumed from its last checkpoint.")
        raise EngineRestarted(message)

    def _await_health(self) -> None:
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                with urlopen(self.url + "/health", timeout=RETRY_S):
                    return
            except (OSError, HTTPException) as error:
                if time.monotonic() > deadline:
                    raise ConnectionError(
                        f"No vLLM server answers at {self.url} after {self.timeout:.0f} seconds ({error}): {HINT}."
                    ) from error
            time.sleep(RETRY_S)


def _write(path: Path, tensors: dict[str, Tensor]) -> str:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    return str(path.resolve())
