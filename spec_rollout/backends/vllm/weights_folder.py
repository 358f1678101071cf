"""The folder that a server reads weights from: of this user alone, and marked, so that a trainer knows it again."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from spec_rollout.backends.vllm.intake import MARK

SHARED_MEMORY = Path("/dev/shm")


def default_folder(port: int) -> Path:
    """In shared memory where the system has it; the same one for a server that is started again."""
    base = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    return base / f"spec-rollout-{os.geteuid()}-{port}"


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Make `folder`, mark it and remove what an earlier push has left in it; at the end, remove it.

    Raises:
        ValueError: others may write there, it holds what no server put there, or another server uses it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if (
        not stat.S_ISDIR(found.st_mode)
        or found.st_uid != os.geteuid()
        or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        raise ValueError(f"{folder} can be written to by others, or is a link: give --weights a folder of your own.")
    foreign = [file.name for file in folder.iterdir() if file.name != MARK and file.suffix != ".safetensors"]
    if foreign or (not (folder / MARK).is_file() and any(folder.iterdir())):
        raise ValueError(f"{folder} holds other files: give --weights a new folder, or an empty one.")
    with (folder / MARK).open("a+") as mark:
        _lock(mark, folder)
        _clear(folder)
        mark.truncate(0)
        mark.write(secrets.token_hex(16))
        mark.flush()
        try:
            yield
        finally:
            _clear(folder)
            (folder / MARK).unlink(missing_ok=True)
            folder.rmdir()


def _lock(mark: IO, folder: Path) -> None:
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"{folder} belongs to a server that runs: give this one another --port, or --weights."
        ) from error


def _clear(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink(missing_ok=True)
