"""The key that a server and its trainers share: from the environment or a file, never from a command line."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

KEY, KEY_FILE = "SPEC_ROLLOUT_KEY", "SPEC_ROLLOUT_KEY_FILE"
LEAST_LENGTH = 16
HOW = (
    f"set {KEY}, or {KEY_FILE} to a file that only you can read, for the server and the trainer; `python -c 'import "
    "secrets; print(secrets.token_urlsafe())'` makes one"
)


def server_key(environment: Mapping[str, str] = os.environ) -> str | None:
    """The key that is set; None if none is.

    Raises:
        ValueError: it is set twice, too short or has spaces, or its file is missing or readable by others.
    """
    given, file = environment.get(KEY), environment.get(KEY_FILE)
    if given is not None and file is not None:
        raise ValueError(f"{KEY} and {KEY_FILE} are both set: keep one of them.")
    if given is None and file is None:
        return None
    name = KEY if file is None else f"{KEY_FILE}={file}"
    key = given if file is None else _read(Path(file))
    if len(key) < LEAST_LENGTH or not key.isascii() or any(c.isspace() for c in key):
        raise ValueError(
            f"{name} holds {len(key)} characters: a key has at least {LEAST_LENGTH}, ASCII and without spaces."
        )
    return key


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{KEY_FILE}={path} is no file.")
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ValueError(f"{KEY_FILE}={path} can be read by others: chmod 600 {path}")
    return path.read_text(encoding="utf-8").strip()


def is_loopback(host: str) -> bool:
    """Whether an address, or the host of a URL or header, is of this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def require_key(host: str, key: str | None) -> None:
    """
    Raises:
        ValueError: a server would listen at `host`, which other machines reach, without a key.
    """
    if key is None and not is_loopback(host):
        raise ValueError(
            f"--host {host} can be reached from other machines, and whoever reaches the server could replace its "
            f"weights: {HOW}; or listen at 127.0.0.1."
        )
