"""vLLM among the samplers of the benchmark: without speculation, and with our own head."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import spec_rollout
from spec_rollout.backends.vllm.engine import INSTALL
from spec_rollout.bench.peers import Measured, Sampler
from spec_rollout.bench.workload import Policy
from spec_rollout.config import SpecConfig
from spec_rollout.draft.checkpoint import save_head
from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.records import RolloutStats, StepStats

VLLM, VLLM_EAGLE = "vllm", "vllm_eagle"
MODULE = "spec_rollout.bench.vllm_process"


def require_vllm_in(python: str) -> None:
    """
    Raises:
        SystemExit: the interpreter `python` has no vLLM; the message says how to get it.
    """
    try:
        code = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
        found = subprocess.run([python, "-c", code], check=False).returncode == 0
    except OSError as error:
        raise SystemExit(f"--vllm-python {python} is not a Python interpreter: {error}") from error
    if not found:
        raise SystemExit(
            f"The peers {VLLM} and {VLLM_EAGLE} need vLLM, which {python} does not have. Name an interpreter that has "
            f"it by --vllm-python, or install it: {INSTALL}."
        )


class Process:
    """A `vllm_process` that is ready to decode."""

    def __init__(self, python: str, setup: dict[str, Any]):
        threads = str(torch.get_num_threads())
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": threads,
            "PYTHONPATH": os.pathsep.join(
                [str(Path(spec_rollout.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
            ),
        }
        self.process = subprocess.Popen(
            [python, "-P", "-m", MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ask(setup)

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            RuntimeError: vLLM ended; it has said why on the standard error.
        """
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            reply = ""
        else:
            reply = self.process.stdout.readline()
        if not reply:
            raise RuntimeError(f"vLLM ended with status {self.process.wait()}; what it printed is above.")
        return json.loads(reply)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class VLLMPeers:
    """Long-lived vLLMs, so that their start is not measured; to be closed.

    One without a head is `vllm`; another holds our head and is `vllm_eagle` with each number of guesses, with none (it
    runs the head all the same), and with those that a controller of ours chooses before each of vLLM's steps.

    Args:
        names: of the peers that are asked for.
        policy_name: folder or hub id.
        dtype: of policy and head.
        slots: the widest batch.
        drafter: ours, whose head is exported.
        gammas: fixed numbers of guesses.
        python: the interpreter that has vLLM; see `require_vllm_in`.
    """

    def __init__(
        self,
        names: Sequence[str],
        policy: Policy,
        policy_name: str,
        dtype: str,
        slots: int,
        drafter: EagleDrafter,
        gammas: Sequence[int],
        python: str,
    ):
        self.gammas, self.processes = list(gammas), {}
        most = max([SpecConfig().widest, *gammas])
        setup = {"policy": policy_name, "dtype": dtype, "slots": slots, "params": asdict(policy.params), "most": most}
        with TemporaryDirectory(prefix="spec-rollout-") as folder:
            for name in names:
                draft = Path(folder, "draft") if name == VLLM_EAGLE else None
                if draft is not None:
                    _export(drafter, draft)
                print(f"starting {name}", file=sys.stderr)
                self.processes[name] = Process(python, setup | {"draft": None if draft is None else str(draft)})

    def samplers(self) -> list[Sampler]:
        """The same at every batch size."""
        found = []
        if VLLM in self.processes:
            found.append(self._sampler(VLLM, 0, None))
        if VLLM_EAGLE in self.processes:
            found += [self._sampler(VLLM_EAGLE, gamma, "rejection") for gamma in [0, *self.gammas, None]]
        return found

    def close(self) -> None:
        for process in self.processes.values():
            process.close()

    def _sampler(self, name: str, gamma: int | None, verification: str | None) -> Sampler:
        process = self.processes[name]

        def run(prompts: list[list[int]], seed: int) -> Measured:
            reply = process.ask({"prompts": prompts, "gamma": gamma, "seed": seed})
            steps = [StepStats(**step) for step in reply["steps"]]
            stats = RolloutStats(steps, reply["seconds"], reply["prefill_s"])
            return Measured(reply["tokens"], reply["seconds"], stats, reply["peak_memory_gib"])

        return Sampler(name, gamma, run, verification)


def _export(drafter: EagleDrafter, folder: Path) -> None:
    """The head as vLLM reads it, with the policy's output head where its vocabulary is not the policy's."""
    ids = drafter.view.draft_ids
    save_head(folder, drafter.head, None if ids is None else drafter.view.output_rows(), ids, {})
