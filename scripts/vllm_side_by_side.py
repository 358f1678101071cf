"""For maintainers: GRPO on vLLM side by side: without speculation, with a frozen head, with one that learns on.

python scripts/vllm_side_by_side.py --policy policies/small --draft HEAD --out runs/side --json side.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from spec_rollout.bench.workload import hardware, positive, positives, table, write_json

RECIPE = Path(__file__).parent.parent / "recipes" / "arithmetic_grpo_vllm.yaml"
GENERATIONS = 8
SKIPPED = 2
"""Steps that do not count: in the first, vLLM starts and is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--draft", required=True, help="a head from pretrain-draft, trained on this policy")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch-sizes", type=positives, default=[1, 8, 32], metavar="1,8,32")
    parser.add_argument("--steps", type=positive, default=8, metavar="N")
    parser.add_argument("--guesses", type=positive, default=3, metavar="N", help="of the frozen head")
    given = parser.parse_args()
    kinds = {
        "plain": ["--num_speculative_tokens", "0"],
        "frozen": [
            *("--draft_model_path", given.draft, "--draft_refresh", "false"),
            *("--num_speculative_tokens", str(given.guesses)),
        ],
        "ours": ["--draft_model_path", given.draft],
    }
    rows = []
    for turn, size in enumerate(given.batch_sizes):
        for kind in kinds if turn % 2 == 0 else reversed(kinds):
            rows.append({"kind": kind, "batch_size": size} | run(given, size, kind, kinds[kind]))
            print(rows[-1], file=sys.stderr)
    columns = ("kind", "batch_size", "tokens_per_s", "step_time", "acceptance_length", "guesses")
    table(columns, [[row[name] for name in columns] for row in rows])
    write_json(given.json, {"rows": rows, "hardware": hardware()})


def run(given: argparse.Namespace, size: int, kind: str, options: list[str]) -> dict:
    """One run of the command that a user would give, of which the medians over its steps are taken."""
    folder = given.out / f"{kind}-{size}"
    command = [
        *(sys.executable, "-m", "spec_rollout.cli", "grpo", "--config", str(RECIPE)),
        *("--model_name_or_path", given.policy, "--output_dir", str(folder), "--max_steps", str(given.steps)),
        *("--max_slots", str(size), "--per_device_train_batch_size", str(max(GENERATIONS, size))),
        *("--num_generations", str(GENERATIONS), *options),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "speculative/goodput" in entry][SKIPPED:]

    def median(name: str) -> float:
        return statistics.median(entry[name] for entry in steps)

    return {
        "tokens_per_s": median("speculative/goodput"),
        "step_time": median("step_time"),
        "rollout_seconds": median("speculative/rollout_seconds"),
        "draft_seconds": median("speculative/refresh_seconds"),
        "acceptance_length": median("speculative/mean_acceptance_length"),
        "guesses": median("speculative/num_speculative_tokens"),
        "steps": len(steps),
    }


if __name__ == "__main__":
    sys.exit(main())
