"""Compiled halves of layers: made ahead of time in a process of their own, once for all layers, and kept on disk."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from spec_rollout.config import cache_folder
from spec_rollout.engine.lean import halves
from spec_rollout.engine.lean.halves import Form, example_of, module_of

Program = Callable[[list], list[Tensor]]
"""Takes the arguments of a half as one flat list, which it empties; gives what the half returns."""


class CannotCompileError(RuntimeError):
    """No program comes of a form: torch or the C++ compiler that it runs failed, or there is none."""


class Programs:
    """The programs of this process, by form.

    A program is torch's ahead-of-time package of one half: native code and json. It is compiled for this processor and
    version of torch, for any number of tokens, and knows no weights; they are arguments. Compiling takes a minute or
    less in a process of its own, so nothing here waits unless it is asked to.
    """

    def __init__(self):
        self._loaded: dict[Form, Program] = {}
        self._running: dict[Form, tuple[subprocess.Popen, Path]] = {}
        self._failed: dict[Form, str] = {}

    @property
    def begun(self) -> bool:
        """Whether anything was compiled or found on the disk so far."""
        return bool(self._running or self._loaded)

    def get(self, forms: set[Form], folder: str | None, wait: bool, begin: bool = True) -> dict[Form, Program] | None:
        """Those of `forms`; None while some are not there. With `begin` it begins to compile these, and with `wait` it
        lasts until they are.

        Raises:
            CannotCompileError: one of them cannot be compiled; it is not tried again in this process.
        """
        missing = [form for form in forms if form not in self._loaded]
        for form in missing:
            if form in self._failed:
                raise CannotCompileError(self._failed[form])
            if form not in self._running and not _path(form, folder).exists():
                if not begin:
                    return None
                self._running[form] = _start(form, _path(form, folder))
        for form in missing:
            if form in self._running:
                process, log = self._running[form]
                if process.poll() is None and not wait:
                    continue
                process.wait()
                del self._running[form]
                said = log.read_text(errors="replace").strip()
                log.unlink()
                if process.returncode:
                    self._failed[form] = said.splitlines()[-1] if said else f"exit code {process.returncode}"
                    raise CannotCompileError(self._failed[form])
            self._loaded[form] = _load(_path(form, folder))
        return {form: self._loaded[form] for form in forms} if forms <= self._loaded.keys() else None

    def stop(self) -> None:
        """End what is still compiling."""
        for process, log in self._running.values():
            process.terminate()
            process.wait()
            log.unlink(missing_ok=True)
        self._running.clear()


PROGRAMS = Programs()
atexit.register(PROGRAMS.stop)


def _start(form: Form, path: Path) -> tuple[subprocess.Popen, Path]:
    handle, log = tempfile.mkstemp(prefix="spec-rollout-compile-", suffix=".log")
    code = f"from {__name__} import build; import sys; build(*sys.argv[1:])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, json.dumps(asdict(form)), str(path)]
    with os.fdopen(handle, "wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
    return process, Path(log)


def build(described: str, path: str) -> None:
    """Compile the form that `described` is the json of, to a file at `path`; runs in a process of its own."""
    fields = json.loads(described)
    shapes = tuple((name, tuple(shape)) for name, shape in fields["shapes"])
    form = Form(**{**fields, "heads": tuple(fields["heads"]), "shapes": shapes})
    arguments, sizes = example_of(form)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    staging = target.with_name(f"{target.stem}-{os.getpid()}.pt2")
    with torch.no_grad():
        exported = torch.export.export(module_of(form), arguments, dynamic_shapes=sizes)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(staging))
    staging.replace(target)


def _load(path: Path) -> Program:
    try:
        return torch._inductor.aoti_load_package(str(path)).loader.boxed_run
    except RuntimeError as error:
        raise CannotCompileError(f"what was compiled earlier cannot be loaded, remove {path}: {error}") from error


def _path(form: Form, folder: str | None) -> Path:
    """Where the program of `form` lies: by all that it was compiled from and for."""
    source = Path(halves.__file__).read_text(encoding="utf-8")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    flags = [line for line in lines if line.startswith(("flags", "Features"))][:1] or lines[:1]
    key = [asdict(form), source, torch.__version__, torch.backends.cpu.get_cpu_capability(), flags, sys.platform]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder(folder) / "programs" / f"{digest}.pt2"
