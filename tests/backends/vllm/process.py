"""`spec-rollout serve` in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

from tests.backends.vllm.tiny import ROWS


class Process:
    """A server of the policy in a folder, on a free port; `environment` is added to this process's."""

    def __init__(self, policy: Path, log: Path, *options: str, environment: dict[str, str] | None = None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url, self.log, self.environment = f"http://127.0.0.1:{self.port}", log, environment or {}
        line = f"serve --policy {policy} --max_slots {ROWS} --port {self.port} --dtype float32 --enforce-eager"
        line += f" --weights {log.parent / f'weights-{self.port}'}"
        self.command = [sys.executable, "-m", "spec_rollout.cli", *line.split(), *options]
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **self.environment}
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(600):
            try:
                urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                time.sleep(0.5)
        raise TimeoutError(self.log.read_text()[-3000:])

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
