"""What stands before all of a server's routes: who may ask, and what for.

vLLM's own key (`--api-key`) covers /v1 and a few more; routes that load weights, put the engine to sleep or run a
method on the workers are open beside it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from spec_rollout.backends.vllm.hold import ASKED, COMPLETIONS, Hold, answered
from spec_rollout.backends.vllm.key import is_loopback, server_key
from spec_rollout.backends.vllm.upload import ROUTE, receive_file

GUARD = "spec_rollout.backends.vllm.guard.Guard"

PATHS = {"/health", "/metrics", "/version", "/server_info", "/reset_prefix_cache", "/collective_rpc"}
"""Routes that are served, beside those under /v1/."""
RPC = "/collective_rpc"
METHODS = "live_"
"""How the names of the worker's methods that may be called begin."""
BEGIN, FINISH = "live_begin", "live_finish"
"""Those between which no token is drawn."""
LONGEST_RPC = 16 * 2**20
"""Bytes of a call; the names and shapes of a large policy's weights are far fewer."""

App = Callable[[dict, Callable, Callable], Awaitable[None]]


class Guard:
    """ASGI middleware that vLLM puts before its application (`--middleware`).

    With a key, each request but GET /health must bring it (`Authorization: Bearer KEY`). Without one the server
    listens at a loopback address; a web page in a browser on this machine must not reach it either.
    """

    def __init__(self, app: App):
        self.app = app
        key = server_key()
        self.key = None if key is None else _digest(key)
        self.hold = Hold()

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # unanswered, a websocket is closed
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refusal(scope["method"], scope["path"], headers)
        if refused is None and scope["path"].startswith(ROUTE):
            await _answer(send, *await receive_file(scope["path"].removeprefix(ROUTE), self.key, receive))
            return
        method = None
        if refused is None and scope["path"] == RPC:
            body = await _body(receive)
            refused = method_refusal(body)
            method = None if refused else method_of(body)
            receive = _again(body, receive)
        if refused is not None:
            await _answer(send, *refused)
        elif method in (BEGIN, FINISH):
            await self._push(method, scope, receive, send)
        elif scope["path"] == COMPLETIONS and ASKED in headers:
            await answered(self.hold, _engine(scope), scope, self.app, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _push(self, method: str, scope: dict, receive: Callable, send: Callable) -> None:
        """Requests wait from the one call to the other; the reply to the last one says that they go on."""
        engine, sent = _engine(scope), []
        if method == BEGIN:
            await self.hold.begin(engine)

        async def keep(message: dict) -> None:
            sent.append(message)

        try:
            await self.app(scope, receive, keep)
        finally:
            await self.hold.settle(engine)
        for message in sent:
            await send(message)

    def _refusal(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and reason, if the request is refused."""
        if path == "/health" and method == "GET":
            return None
        if self.key is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(given), self.key):
                return 401, "This server wants its key: Authorization: Bearer KEY."
        elif "origin" in headers or not is_loopback(urlsplit(f"//{headers.get('host', '')}").hostname or ""):
            return 403, "Without a key this server answers programs on its own machine only, not web pages."
        uploads = method == "PUT" and path.startswith(ROUTE)
        if path not in PATHS and not path.startswith("/v1/") and not uploads:
            return 403, f"{path} is not served by spec-rollout serve."
        return None


def method_refusal(body: bytes | None) -> tuple[int, str] | None:
    """Status and reason, if the call of a worker's method in `body` (None: too long) is refused."""
    if body is None:
        return 413, f"A call has at most {LONGEST_RPC} bytes."
    try:
        method = method_of(body)
    except ValueError:
        return 400, "The call is not JSON."
    if method is None or not method.startswith(METHODS):
        return 403, f"Only methods of the worker that begin with {METHODS} may be called."
    return None


def method_of(body: bytes) -> str | None:
    """The method that is called in `body`.

    Raises:
        ValueError: it is not JSON.
    """
    call: Any = json.loads(body)
    method = call.get("method") if isinstance(call, dict) else None
    return method if isinstance(method, str) else None


def _engine(scope: dict) -> Any:
    """vLLM's, behind the application that Starlette names here."""
    return scope["app"].state.engine_client


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8")).digest()


async def _body(receive: Callable) -> bytes | None:
    """The whole body, None if it is too long."""
    parts, size = [], 0
    while True:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size > LONGEST_RPC:
            return None
        parts.append(part)
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return b"".join(parts)


def _again(body: bytes | None, receive: Callable) -> Callable:
    """Gives the body that was read ahead once more, then whatever comes."""
    messages = [{"type": "http.request", "body": body or b"", "more_body": False}]

    async def replay() -> dict:
        return messages.pop() if messages else await receive()

    return replay


async def _answer(send: Callable, status: int, reason: str) -> None:
    body = json.dumps({"error" if status >= 400 else "taken": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
