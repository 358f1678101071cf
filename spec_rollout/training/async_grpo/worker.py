"""TRL's rollout process with our server: it brings the key and the noise keys, and takes home the versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from http.client import BAD_REQUEST
from typing import Any

from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker, RolloutSample, _AsyncRolloutLoop

from spec_rollout.backends.vllm.hold import ASKED, COMPLETIONS, VERSIONS, Ranges
from spec_rollout.backends.vllm.key import server_key
from spec_rollout.backends.vllm.keyed_batch import keyed
from spec_rollout.engine.noise import request_keys

PREFIX = "speculative/"


@dataclass
class Conversation:
    """One that is under way: what its noise follows from, and the versions that drew each of its turns."""

    seed: tuple[int, ...]
    turns: list[Ranges] = field(default_factory=list)


UNDER_WAY: ContextVar[Conversation] = ContextVar("UNDER_WAY")
"""Of each of the loop's tasks."""


@dataclass(slots=True)
class VersionedSample(RolloutSample):
    """TRL's, with the versions of its conversation: for each turn, ranges of tokens as the server tells them."""

    versions: list[Ranges] = field(default_factory=list)


class SpecRolloutLoop(_AsyncRolloutLoop):
    """What the process runs.

    Args:
        seed: of the noise; a conversation's follows from it, its place in the dataset and its number among those of
            the same prompt.
        coupled: whether the server draws by noise keys.
    """

    def __init__(self, *, seed: int, coupled: bool, **options: Any):
        super().__init__(**options)
        self.seed, self.coupled = seed, coupled
        self._first = options.get("dataset_start_index", 0)
        self._begun: Counter = Counter()
        self._turns: dict[str, list[Ranges]] = {}

    @property
    def session(self) -> Any:
        """TRL's, whose requests all bring the key."""
        return self._session

    @session.setter
    def session(self, session: Any) -> None:
        if session is not None:
            key = server_key()
            session.headers.update({ASKED: "1"} | ({"Authorization": f"Bearer {key}"} if key else {}))
        self._session = session

    async def _generate_one(self, prompt, tool_dict, tools, group_id=0):
        place = self._begun[group_id]
        self._begun[group_id] += 1
        if place + 1 == self.num_generations:
            del self._begun[group_id]
        conversation = Conversation((self.seed, 1, self._first + group_id, place))
        UNDER_WAY.set(conversation)
        drawn = await super()._generate_one(prompt, tool_dict, tools, group_id)
        for sequence in drawn[2]:
            self._turns[sequence.rollout_id] = conversation.turns
        return drawn

    async def _post(self, path: str, payload: dict, timeout: float, max_retries: int = 3) -> dict:
        if path != COMPLETIONS:
            return await super()._post(path, payload, timeout, max_retries)
        from aiohttp import ClientResponseError

        conversation = UNDER_WAY.get()
        if self.coupled:
            key = request_keys((*conversation.seed, len(conversation.turns)), 1)
            sent = {name: value for name, value in payload.items() if name not in ("seed", "min_p")}
            payload = sent | {"vllm_xargs": keyed(key, self.min_p or 0.0)}
        try:
            output = await super()._post(path, payload, timeout, max_retries)
        except ClientResponseError as error:
            if error.status != BAD_REQUEST:
                raise  # it may be asked again
            raise ValueError(
                f"The vLLM server at {self.vllm_server_url} refuses {len(payload['prompt'])} prompt tokens with "
                f"max_completion_length={self.max_tokens} in turn {len(conversation.turns) + 1} of a conversation, "
                "which may have outgrown its context: lower max_completion_length or max_tool_calling_iterations, or "
                "start the server with a larger --max-model-len."
            ) from error
        conversation.turns.append(told(output["choices"][0], self.vllm_server_url))
        return output

    async def _score_group(self, group) -> list[RolloutSample]:
        samples = await super()._score_group(group)
        rows = [row for conversation in group.completions_sequences for row in conversation]
        turns = [self._turns[row.rollout_id] for row in rows]
        for row in rows:
            self._turns.pop(row.rollout_id, None)
        return [versioned(sample, of) for sample, of in zip(samples, turns, strict=True)]


class SpecRolloutWorker(AsyncRolloutWorker):
    """The trainer's side of it.

    Args:
        starved: called when the trainer has waited in vain for a while.
    """

    _loop_cls = SpecRolloutLoop

    def __init__(self, *, starved: Callable[[], None], **options: Any):
        super().__init__(**options)
        self._starved = starved

    def check_health(self, stale_after_s: float) -> None:
        super().check_health(stale_after_s)
        self._starved()


def told(choice: dict, url: str) -> Ranges:
    """The versions in a reply.

    Raises:
        RuntimeError: there are none.
        ConnectionResetError: the server was started again and holds no pushed policy; it may be asked again.
    """
    ranges = choice.get(VERSIONS)
    if not ranges:
        raise RuntimeError(
            f"The vLLM server at {url} does not tell which weights drew a completion: start it with `spec-rollout "
            "serve` of this version, and on a GPU with --no-async-scheduling."
        )
    if ranges[0][1] == 0:
        raise ConnectionResetError(f"The vLLM server at {url} draws by the weights that it was started with.")
    return ranges


def versioned(sample: RolloutSample, turns: list[Ranges]) -> VersionedSample:
    """`sample` with the versions of its conversation, which the trainer logs too."""
    ranges = [part for turn in turns for part in turn]
    figures = {
        "policy_version_oldest": float(min(policy for _, policy, _ in ranges)),
        "policy_version_newest": float(max(policy for _, policy, _ in ranges)),
        "draft_version_newest": float(max(draft for *_, draft in ranges)),
        "pushes_within": float(len({policy for _, policy, _ in ranges}) - 1),
    }
    own = {of.name: getattr(sample, of.name) for of in fields(RolloutSample)}
    own["metrics"] = sample.metrics | {PREFIX + name: value for name, value in figures.items()}
    return VersionedSample(**own, versions=turns)
