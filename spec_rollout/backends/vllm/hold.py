"""No token is drawn while weights come, and a completion says by which weights its tokens were drawn."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from spec_rollout.backends.vllm.intake import FINISHED, INTERRUPTED

ASKED = "x-spec-rollout-versions"
"""Header of a request to `COMPLETIONS`, of one prompt and one completion and not streamed, whose reply shall tell
versions."""
COMPLETIONS = "/v1/completions"
VERSIONS = "versions"
"""Entry of the reply's choice: [first token, version of the policy, of the draft] for each range of tokens that the
same weights drew, in order; null if it went through a push on a runner that does not tell how far it had come."""
NAME = re.compile(r"cmpl-([0-9a-f]{32})-0(?:-[0-9a-f]{8})?")
"""vLLM's name of a request whose X-Request-Id the guard chose."""

Ranges = list[list[int]]


class Hold:
    """Holds a server's requests from the beginning of a push to its end, and follows those that go on behind it.

    Such a request has drawn some tokens by the old weights. Its keys and values are made anew by the new ones before
    it goes on, so each of its log-probs is of one policy. After a push that was cut short requests stay held until one
    comes that is whole: what the server holds is no policy.
    """

    def __init__(self):
        self.versions: list[int] | None = None
        self._followed: dict[str, Ranges | None] = {}
        self._turn = asyncio.Lock()
        self._held = False

    async def begin(self, engine: Any) -> None:
        """Before a push: vLLM's `engine` ends the step that it is in and begins no other."""
        async with self._turn:
            if not self._held:
                await self._known(engine)
                await engine.pause_generation(mode="keep", clear_cache=False)
                self._held = True

    async def settle(self, engine: Any) -> None:
        """After a call that began a push or ended one: go on if the workers hold a whole policy."""
        async with self._turn:
            found = [tuple(held) for held in await engine.collective_rpc("live_versions")]
            if not self._held or any(policy == INTERRUPTED for policy, _ in found):
                return
            if list(found[0]) != self.versions:
                self._cross((await engine.collective_rpc("live_under_way"))[0], list(found[0]))
                await engine.reset_prefix_cache(reset_running_requests=True)
            await engine.resume_generation()
            self._held = False

    async def follow(self, engine: Any) -> str:
        """A request has come; returns the name that it shall have."""
        async with self._turn:
            await self._known(engine)
            name = uuid.uuid4().hex
            self._followed[name] = [[0, *self.versions]]
        return name

    def leave(self, name: str, body: bytes = b"") -> bytes:
        """The reply `body` to the request `name`, with its versions."""
        ranges = self._followed.pop(name)
        reply = json.loads(body or b"{}")
        choices = reply.get("choices") if isinstance(reply, dict) else None
        if not choices or len(choices) != 1:
            return body
        drawn = choices[0].get("token_ids") or (choices[0].get("logprobs") or {}).get("tokens")
        if ranges and drawn:  # a guess that came true behind the end of a completion was counted
            ranges = [part for part in ranges if part[0] < len(drawn)]
        choices[0][VERSIONS] = ranges
        return json.dumps(reply).encode()

    async def _known(self, engine: Any) -> None:
        if self.versions is None:
            self.versions = list((await engine.collective_rpc("live_follow"))[0])

    def _cross(self, under_way: dict[str, int] | None, versions: list[int]) -> None:
        """Requests go on by the weights of `versions`; `under_way` are the tokens that they had drawn."""
        matched = ((NAME.fullmatch(name), drawn) for name, drawn in (under_way or {}).items())
        drawn = {match[1]: tokens for match, tokens in matched if match}
        for name, ranges in self._followed.items():
            tokens = drawn.get(name, 0)
            if under_way is None or ranges is None:
                self._followed[name] = None
            elif tokens != FINISHED:
                self._followed[name] = [part for part in ranges if part[0] < tokens] + [[tokens, *versions]]
        self.versions = versions


async def answered(
    hold: Hold, engine: Any, scope: dict, app: Callable[..., Awaitable[None]], receive: Callable, send: Callable
) -> None:
    """Have `app` answer a request that asks for versions."""
    name = await hold.follow(engine)
    headers = [pair for pair in scope["headers"] if pair[0].lower() != b"x-request-id"]
    scope = {**scope, "headers": [*headers, (b"x-request-id", name.encode())]}
    parts: list[bytes] = []
    start: dict = {}

    async def collect(message: dict) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            parts.append(message.get("body", b""))

    try:
        await app(scope, receive, collect)
    finally:
        body = hold.leave(name, b"".join(parts) if start.get("status") == 200 else b"") or b"".join(parts)
    kept = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
    await send({**start, "headers": [*kept, (b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})
