"""Weights of a trainer that sees no folder of the server's: files that it sends over HTTP into that folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from spec_rollout.backends.vllm.intake import FOLDER, NAME
from spec_rollout.backends.vllm.key import HOW

ROUTE = "/weights/"
"""With a file's name behind it; by PUT, for those who bring the server's key."""
LARGEST = 2**34
"""Bytes of a file: a bucket's, or a single weight's if that is larger."""


async def receive_file(name: str, key: bytes | None, receive: Callable) -> tuple[int, str]:
    """Write the body of a request to the file `name` of the agreed folder, in the place of all that came before;
    returns status and reason. A server without a key takes none: those who may not write to its folder could do so."""
    if key is None:
        return 403, f"Without a key weights are read from files of this machine only: {HOW}."
    folder = os.environ.get(FOLDER)
    if folder is None or not NAME.fullmatch(name):
        return 403, f"{name} is no name of a file of weights."
    for file in Path(folder).glob("*.safetensors"):
        file.unlink(missing_ok=True)  # the trainer sends the next one when the last one has been loaded
    target = Path(folder, name)
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as opened:
            whole = await _write(opened.write, receive)
    except OSError as error:
        target.unlink(missing_ok=True)
        return 507, f"{name} cannot be written to {folder}: {error}"
    if not whole:
        target.unlink(missing_ok=True)
        return 413, f"{name} has not come whole, or has more than {LARGEST} bytes."
    return 201, name


async def _write(write: Callable[[bytes], int], receive: Callable) -> bool:
    """Whether the whole body came."""
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return False
        part = message.get("body", b"")
        size += len(part)
        if size > LARGEST:
            return False
        write(part)
        if not message.get("more_body"):
            return True
