"""Requests to a vLLM server, and how long they may take."""

from __future__ import annotations

import json
import time
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from spec_rollout.backends.vllm.engine import EngineRestarted
from spec_rollout.backends.vllm.key import HOW, server_key

RETRY_S = 2.0
HINT = "start one with `spec-rollout serve`, and give its address by vllm_server_base_url, or _host and _port"


class Connection:
    """A server that answers at an address.

    Args:
        url: such as http://127.0.0.1:8000.
        timeout: seconds to wait for the server, at the start, when it is lost, and for its short answers.

    Raises:
        ConnectionError: there is no server.
        PermissionError: it wants another key.
        ValueError: `url` is none.
    """

    def __init__(self, url: str, timeout: float):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"vllm_server_base_url={url!r} is no address of a server: write http://HOST:PORT.")
        self.url, self.timeout = url.rstrip("/"), timeout
        key = server_key()
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._await_health()

    def _request(self, path: str, body: dict | None = None, seconds: float | None = None) -> Any:
        """The decoded reply, which may take `seconds`, by default `timeout`.

        Raises:
            EngineRestarted: the server was lost meanwhile, and is there again.
            ConnectionError: it was lost and did not come back in time, or it does not answer in time.
            RuntimeError: it refused.
        """
        data = None if body is None else json.dumps(body).encode()
        return self._answer(Request(self.url + path, data, self.headers), path, seconds or self.timeout)

    def _send_file(self, path: str, file: Path, seconds: float) -> None:
        """PUT `file`; raises what `_request` does."""
        size = str(file.stat().st_size)
        headers = {**self.headers, "Content-Type": "application/octet-stream", "Content-Length": size}
        with file.open("rb") as content:
            self._answer(Request(self.url + path, content, headers, method="PUT"), path, seconds)

    def _answer(self, request: Request, path: str, seconds: float) -> Any:
        try:
            with urlopen(request, timeout=seconds) as reply:
                text = reply.read().decode()
        except HTTPError as error:
            if error.code == 401:
                raise PermissionError(
                    f"The vLLM server at {self.url} does not take this trainer's key: {HOW}."
                ) from error
            raise RuntimeError(f"{path}: status {error.code}, {error.read().decode()[:300]}") from error
        except TimeoutError as error:
            raise ConnectionError(
                f"The vLLM server at {self.url} has not answered {path} within {seconds:.0f} seconds: its own log may "
                "say why; start it again and resume the run."
            ) from error
        except (OSError, HTTPException) as error:
            self._await_health()
            self._lost(f"It was lost ({error!r}).")
        return json.loads(text) if text.startswith(("{", "[")) else text

    def _lost(self, what: str) -> None:
        raise EngineRestarted(f"The vLLM server at {self.url}: {what}")

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
