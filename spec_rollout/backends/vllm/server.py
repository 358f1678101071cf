"""A vLLM server that takes our weights: started by `spec-rollout serve`, driven over HTTP.

Weights travel as safetensors files in a folder that the server names (`handover`, `intake`); where the trainer does
not see it, over HTTP (`upload`).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from spec_rollout.backends.vllm.connection import HINT, Connection
from spec_rollout.backends.vllm.engine import EngineRestarted, PolicyWeights, completion, sampling_options
from spec_rollout.backends.vllm.handover import Named, hand_over, shapes_of, total_bytes
from spec_rollout.backends.vllm.intake import MARK, Shapes
from spec_rollout.backends.vllm.key import HOW
from spec_rollout.backends.vllm.keyed_batch import keyed
from spec_rollout.backends.vllm.served import refuse_lossy, refuse_other_draft, refuse_other_guesses
from spec_rollout.backends.vllm.steady import refuse_unsteady, room
from spec_rollout.backends.vllm.steps import EMITTED, ServedSteps, counters
from spec_rollout.backends.vllm.upload import ROUTE
from spec_rollout.backends.vllm.weights_folder import SHARED_MEMORY
from spec_rollout.config import SpecConfig
from spec_rollout.records import Completion, SamplingParams

LONGEST_S = 3600.0
"""A rollout or a push that takes longer than this hangs."""


class Server(Connection, ServedSteps):
    """A `VLLMEngine` behind a server's address, for one process: its counters of guesses are everybody's.

    Args:
        url: such as http://127.0.0.1:8000.
        policy: the live policy.
        config: the numbers of guesses that are asked for.
        timeout: seconds to wait for the server, at the start, when it is lost, and for its short answers.
        shown: whether a push shows its progress.
        speculative: the speculative_config that it should have been started with; None where that is not told.

    Attributes:
        max_model_len: tokens of a prompt and its completion together.
        policy_shapes: of the policy's weights; None until they have been walked through once.

    Raises:
        ConnectionError: there is no server, or one that does not take our weights.
        ValueError: the server samples lossily, or guesses other numbers of tokens.
    """

    def __init__(
        self,
        url: str,
        policy: PolicyWeights,
        config: SpecConfig,
        timeout: float = 240.0,
        shown: bool = False,
        speculative: dict[str, Any] | None = None,
    ):
        super().__init__(url, timeout)
        self.policy, self.shown = policy, shown
        self.policy_shapes: Shapes | None = None
        ServedSteps.__init__(self)
        self._held = self.versions()
        self._watched: tuple[Counter, float] | None = None
        self.verification = config.verification
        described = self._request("/v1/models")["data"][0]
        self.model, self.max_model_len = described["id"], described["max_model_len"]
        served = self._request("/server_info?config_format=json")["vllm_config"]
        refuse_lossy(self.url, served)
        self.speculates = bool(served.get("speculative_config"))
        refuse_other_guesses(self.url, served.get("speculative_config") or {}, config)
        refuse_other_draft(self.url, served, speculative)
        self._room = room(served.get("speculative_config"), self.max_model_len)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        limits: Sequence[int] | None = None,
        keys: Sequence[tuple[int, int]] | None = None,
    ) -> list[Completion]:
        bounds = list(limits or [params.max_new_tokens] * len(prompts))
        refuse_unsteady(prompts, bounds, self._room)
        before, began = self._counters(), time.perf_counter()
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

    def load(self, draft: Named | None, version: int) -> None:
        if self.policy_shapes is None:
            self.policy_shapes = shapes_of(self.policy())
        self.push(self.policy(), draft, version)

    def push(self, policy: Named, draft: Named | None, version: int) -> None:
        """What `load` does, with weights that were walked through before."""
        folder, mark = self._folder()
        parts: dict[str, tuple[Named, Shapes]] = {"policy": (policy, self.policy_shapes)}
        if draft is not None:
            held = list(draft)
            parts["draft"] = held, shapes_of(held)
        announced = json.dumps({part: shapes for part, (_, shapes) in parts.items()})
        self._told("live_begin", mark, announced, str(version), json.dumps(self._held))
        size = sum(total_bytes(shapes) for _, shapes in parts.values())
        options = {"unit": "B", "unit_scale": True, "leave": False, "disable": not self.shown}
        way = f"push {version}{' over HTTP' * (folder is None)}"
        with tqdm(total=size, desc=way, **options) as bar, nullcontext(folder) if folder else _own_folder() as place:
            for part, (weights, shapes) in parts.items():

                def take(file: str, part: str = part) -> None:
                    if folder is None:
                        self._send_file(ROUTE + file, Path(place, file), LONGEST_S)
                    self._told("live_take", part, file)

                hand_over(weights, shapes, Path(place), f"{part}-{version}", take, bar)
        self._told("live_finish", str(version))
        # Behind the weights: a server that was restarted in between is known by those that it does not hold.
        self.verification = self._call("live_verify", self.verification)[0]
        self._request("/reset_prefix_cache", {})
        self._held = self.versions()

    def versions(self) -> list[int]:
        """Of all workers, which must agree."""
        try:
            found = self._call("live_versions")
        except EngineRestarted:
            raise
        except RuntimeError as error:
            raise ConnectionError(f"The server at {self.url} cannot take weights ({error}): {HINT}.") from error
        if any(own != found[0] for own in found):
            raise RuntimeError(
                f"The workers of the server at {self.url} hold unlike versions, {found}: start it again."
            )
        return found[0]

    def draft_probe(self) -> list[dict[str, float]]:
        return self._call("live_probe")

    def watch(self) -> None:
        """Account for what the server has drawn since the last call, for whomever; of one that was started again
        meanwhile, since then."""
        try:
            counted, now = self._counters(), time.perf_counter()
        except EngineRestarted:  # the next push notices
            self._watched = Counter(), time.perf_counter()
            return
        before, began = self._watched or (counted, now)
        if any(counted[name] < number for name, number in before.items()):
            before = Counter()
        since = counted - before
        self._account(since, since[EMITTED], now - began)
        self._watched = counted, now

    def near_ties(self) -> int:
        try:
            return int(self._call("live_near_ties")[0])
        except EngineRestarted:  # the next push notices
            return 0

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

    def _counters(self) -> Counter:
        return counters(self._request("/metrics"))

    def _folder(self) -> tuple[Path | None, str]:
        """Where the server reads weights from, None if this machine does not see it, and the mark that tells.

        Raises:
            ConnectionError: it is not seen here, and the server takes no files over HTTP.
        """
        found = self._call("live_folder")[0]
        if not found:
            raise ConnectionError(f"The server at {self.url} reads weights from nowhere: {HINT}.")
        folder, mark = Path(found[0]), found[1]
        try:
            seen = (folder / MARK).read_text() == mark
        except OSError:
            seen = False
        if not seen and "Authorization" not in self.headers:
            raise ConnectionError(
                f"The server at {self.url} reads weights from {folder}, where this process finds none of its files. "
                f"Start it with `spec-rollout serve --weights DIR`, a folder that both see under that name, or have "
                f"them sent over HTTP, for which both need a key: {HOW}."
            )
        return folder if seen else None, mark

    def _told(self, method: str, *arguments: str) -> None:
        """Have each worker do its part of a push.

        Raises:
            EngineRestarted: the server knows of no push, though one had begun.
            RuntimeError: one refused.
        """
        for rank, refusal in enumerate(self._call(method, *arguments, seconds=LONGEST_S)):
            if refusal and method != "live_begin" and self.versions() == [0, 0]:
                self._lost("It was restarted during a push.")
            if refusal:
                raise RuntimeError(f"Worker {rank} of the vLLM server at {self.url} refused a push: {refusal[0]}")

    def _call(self, method: str, *arguments: Any, seconds: float | None = None) -> list:
        """What one of the methods of `LiveWeights` answers on each worker."""
        return self._request("/collective_rpc", {"method": method, "args": list(arguments)}, seconds)["results"]


def _own_folder() -> TemporaryDirectory:
    """For files on their way to a server on another machine; in memory where that can be had."""
    return TemporaryDirectory(prefix="spec-rollout-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None)
