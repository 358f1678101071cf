"""For maintainers: GRPO on two ranks and a server that is killed in a rollout, in a push and between the two, while a
rank is stopped for a minute; then the same run without any of it.

python scripts/trial_by_fire.py --policy policies/small --draft heads/small --json fire.json [options of the trainer]

The draft stays as it is and TRL's correction is off, so that what is learned follows from the tokens alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from spec_rollout.backends.vllm.server import Server
from spec_rollout.bench.workload import hardware, write_json
from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer
from spec_rollout.training.launch import launch

ROOT = Path(__file__).parent.parent
PORT, GUESSES, ROWS, STEPS = 8764, 3, 16, 30
STOP_S = 60
FAULTS = {7: "rollout", 14: "push", 21: "between", 26: "stop"}
"""What happens in which step: where the server is killed, or rank 1 stopped."""


def main() -> None:
    if os.environ.get("FIRE"):
        rank_main(Path(os.environ["FIRE"]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--json", type=Path)
    given, others = parser.parse_known_args()
    runs = {}
    for name, faults in (("faults", FAULTS), ("calm", {})):
        with TemporaryDirectory() as folder:
            runs[name] = trial(given, others, Path(folder), faults)
    figures = {"faults": FAULTS, **compared(runs), "hardware": hardware()}
    print(json.dumps(figures, indent=1))
    write_json(given.json, figures)


def trial(given: argparse.Namespace, others: list[str], folder: Path, faults: dict[int, str]) -> dict:
    """What the ranks of one run saw, and what was done to them."""
    began, server = time.perf_counter(), serve(given)
    line = ["--config", str(ROOT / "recipes" / "arithmetic_grpo_vllm_server.yaml"), "--use_cpu", "--vllm_server_port"]
    line += [str(PORT), "--model_name_or_path", given.policy, "--draft_model_path", given.draft]
    line += ["--num_speculative_tokens", str(GUESSES), "--per_device_train_batch_size", str(ROWS // 2)]
    line += ["--draft_refresh", "false", "--vllm_importance_sampling_correction", "false"]
    line += ["--max_steps", str(STEPS), "--output_dir", str(folder / "run"), *others]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        __file__,
        *line,
    ]
    ranks = subprocess.Popen(torchrun, env={**os.environ, "FIRE": str(folder)}, start_new_session=True)
    done = []
    try:
        for step, fault in faults.items():
            await_phase(folder, ranks, step, fault)
            if fault == "stop":
                stop(folder)
            else:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
                server = serve(given)
            done.append((folder / "phase").read_text())
        if ranks.wait():
            raise SystemExit("The ranks failed.")
    finally:
        for process in (ranks, server):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return {"ranks": found, "done": done, "seconds": time.perf_counter() - began}


def serve(given: argparse.Namespace) -> subprocess.Popen:
    line = f"serve --policy {given.policy} --draft {given.draft} --num_speculative_tokens {GUESSES} --port {PORT} "
    line += f"--max_slots {ROWS} --dtype float32 --enforce-eager"
    command = [sys.executable, "-m", "spec_rollout.cli", *line.split()]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def await_phase(folder: Path, ranks: subprocess.Popen, step: int, fault: str) -> None:
    wanted = f"{step} {'rollout' if fault == 'stop' else fault}"
    file = folder / "phase"
    while not file.exists() or file.read_text() != wanted:
        if ranks.poll() is not None:
            raise SystemExit(f"The ranks ended before {wanted}.")
        time.sleep(0.002)


def stop(folder: Path) -> None:
    pid = int((folder / "pid1").read_text())
    os.kill(pid, signal.SIGSTOP)
    time.sleep(STOP_S)
    os.kill(pid, signal.SIGCONT)


def rank_main(folder: Path) -> None:
    """One rank: trains, tells where rank 0 is, and writes what it saw."""
    rank = int(os.environ["RANK"])
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    seen: list[str] = []
    records: list[int] = []
    tell = Phases(folder / "phase")
    if rank == 0:
        tell.watch()
    watch_rollouts(tell, seen, records)
    trainer = launch(SpecGRPOTrainer, SpecGRPOConfig)
    weights = hashlib.sha256()
    for weight in trainer.model.parameters():
        weights.update(weight.detach().numpy().tobytes())
    logged = [entry for entry in trainer.state.log_history if "speculative/goodput" in entry]
    found = {
        "weights": weights.hexdigest(),
        "sum_of_weights": sum(weight.double().sum().item() for weight in trainer.model.parameters()),
        "seen": seen,
        "records": records,
        "reward": [entry["reward"] for entry in logged],
        "step_time": [entry["step_time"] for entry in logged],
        "logp_difference_max": [entry["sampling/sampling_logp_difference/max"] for entry in logged],
        "mean_acceptance_length": [entry["speculative/mean_acceptance_length"] for entry in logged],
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


class Phases:
    """Tells in a file what rank 0 is doing: a step and "push", "rollout" or "between"."""

    def __init__(self, file: Path):
        self.file, self.step = file, 0

    def write(self, phase: str) -> None:
        scratch = self.file.with_suffix(".new")
        scratch.write_text(f"{self.step} {phase}")
        scratch.replace(self.file)

    def watch(self) -> None:
        push, draw = Server.push, Server._draw

        def pushing(*given):
            push(given[0], slowly(given[1], self), *given[2:])
            self.write("pushed")

        def drawing(*given):
            self.write("rollout")
            return draw(*given)

        Server.push, Server._draw = pushing, drawing


def slowly(weights, tell: Phases) -> Iterator:
    """In the middle of the weights the push is told of, and waits to be hit."""
    for number, pair in enumerate(weights):
        if number == 4 and tell.step in FAULTS:
            tell.write("push")
            time.sleep(0.2)
        yield pair


def watch_rollouts(tell: Phases, seen: list[str], records: list[int]) -> None:
    sample = SpecGRPOTrainer._sample_turn

    def sampling(trainer, *given):
        tell.step = trainer.state.global_step + 1
        completions = sample(trainer, *given)
        seen.append(hashlib.sha256(json.dumps([c.token_ids for c in completions]).encode()).hexdigest())
        records.append(trainer.sampler.backend.stats.emitted)
        records.append(sum(len(c.token_ids) for c in completions))
        if trainer.accelerator.is_main_process:
            tell.write("between")
            if FAULTS.get(tell.step) == "between":
                time.sleep(0.2)
        return completions

    SpecGRPOTrainer._sample_turn = sampling


def compared(runs: dict[str, dict]) -> dict:
    """What must hold, as figures."""
    hit, calm = runs["faults"]["ranks"], runs["calm"]["ranks"]
    counted = [run["records"][::2] for run in hit]
    drawn = [run["records"][1::2] for run in hit]
    return {
        "steps": [len(run["seen"]) for run in hit],
        "hit_at": runs["faults"]["done"],
        "tokens_counted_once": all(a == sum(own) for a, own in zip(counted[0], zip(*drawn, strict=True), strict=True)),
        "rollouts_that_differ": sum(
            a["seen"][i] != b["seen"][i] for a, b in zip(hit, calm, strict=True) for i in range(len(a["seen"]))
        ),
        "weights_equal": [run["weights"] for run in hit] == [run["weights"] for run in calm],
        "ranks_equal": hit[0]["weights"] == hit[1]["weights"],
        "sums_of_weights": [hit[0]["sum_of_weights"], calm[0]["sum_of_weights"]],
        "largest_logp_difference": max(max(run["logp_difference_max"]) for run in hit),
        "mean_acceptance_length": [hit[0]["mean_acceptance_length"], calm[0]["mean_acceptance_length"]],
        "reward": [hit[0]["reward"], calm[0]["reward"]],
        "step_time": [hit[0]["step_time"], calm[0]["step_time"]],
        "seconds": [runs["faults"]["seconds"], runs["calm"]["seconds"]],
    }


if __name__ == "__main__":
    sys.exit(main())
