"""For maintainers: how long a push of a policy to a server takes, by the folder that its weights go through.

python scripts/vllm_push.py --policy policies/1.5b --folders /dev/shm/push /tmp/push --json push.json
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from spec_rollout.backends.vllm import handover
from spec_rollout.backends.vllm import server as server_module
from spec_rollout.backends.vllm.handover import buckets, hand_over, total_bytes
from spec_rollout.backends.vllm.server import Server
from spec_rollout.bench.workload import hardware, load_policy, write_json
from spec_rollout.config import SpecConfig

PORT = 8765


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folders", nargs="+", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=4, help="pushes, of which the first is not counted")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = load_policy(given.policy, given.dtype, 16).model
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.0)  # not a view of the file
    found = {str(folder): pushes(given, model, folder) for folder in given.folders}
    figures = {"parameters": model.num_parameters(), "pushes": found, "hardware": hardware()}
    print(found)
    write_json(given.json, figures)


def pushes(given: argparse.Namespace, model: torch.nn.Module, folder: Path) -> dict:
    """Seconds and sizes of pushes through `folder`, and of their parts."""
    line = f"serve --policy {given.policy} --num_speculative_tokens 0 --max_slots 8 --port {PORT} --weights {folder}"
    line += f" --dtype {given.dtype} --enforce-eager --max-model-len 512"
    process = subprocess.Popen([sys.executable, "-m", "spec_rollout.cli", *line.split()], env={**os.environ})
    try:
        config = SpecConfig(rollout_backend="vllm", num_speculative_tokens=0)
        server = Server(f"http://127.0.0.1:{PORT}", model.named_parameters, config, 300, shown=True)
        parts: dict[str, float] = {}
        timed(handover, "write", parts)
        timed(server_module.Server, "_told", parts)
        turns = []
        for number in range(1, given.turns + 1):
            parts.clear()
            began = time.perf_counter()
            server.load(None, number)
            turns.append({"seconds": time.perf_counter() - began, **parts})
        size = total_bytes(server.policy_shapes)
        seconds = sorted(turn["seconds"] for turn in turns[1:])[(given.turns - 1) // 2]
        files = len(list(buckets(server.policy_shapes, handover.BUCKET)))
        alone = written_alone(server, model, folder)
        return {
            "bytes": size,
            "files": files,
            "turns": turns,
            "median_s": seconds,
            "GB_per_s": size / seconds / 1e9,
            "written_without_a_reader_s": alone,
        }
    finally:
        process.terminate()
        process.wait()


def timed(owner: object, name: str, parts: dict[str, float]) -> None:
    """Sum up in `parts` what calls of a function take; the server loads while the next file is written."""
    whole = getattr(owner, name)
    whole = getattr(whole, "untimed", whole)

    def call(*args, **options):
        began = time.perf_counter()
        try:
            return whole(*args, **options)
        finally:
            label = f"{name} {args[1]}" if name == "_told" else name
            parts[label] = parts.get(label, 0.0) + time.perf_counter() - began

    call.untimed = whole
    setattr(owner, name, call)


def written_alone(server: Server, model: torch.nn.Module, folder: Path) -> float:
    """Seconds that the files take, without anybody who reads them."""
    with handover.tqdm(disable=True) as bar:
        began = time.perf_counter()
        hand_over(model.named_parameters(), server.policy_shapes, folder, "policy-0", lambda file: None, bar)
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
