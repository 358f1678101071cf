"""Replays against real rollouts at settings that the costs were not fitted on, and what recording costs.

python scripts/validate_traces.py --policy DIR --json benchmarks/cpu-small-simulate.json
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from spec_rollout.backends.calibration import measured_cost
from spec_rollout.backends.trace import RolloutTrace, TraceRecorder
from spec_rollout.config import SpecConfig
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.gamma import CostModel, FixedGamma, GammaController
from spec_rollout.profile.replay import Costs, Work, acceptance, position_rates, replay
from spec_rollout.profile.workload import (
    Policy,
    arithmetic_prompts,
    hardware,
    load_policy,
    positive,
    table,
    warm_backend,
    write_json,
)

COMPLETIONS, SLOTS, WIDEST = 48, 48, SpecConfig().max_num_speculative_tokens
FITTED = ((16, 0), (16, None), (48, 0), (48, 3), (48, None))
"""(slots, γ) of the rollouts that the costs are fitted on; None is adaptive."""
HELD_OUT = ((8, 0), (8, None), (24, 0), (24, None), (24, 5), (32, 1))
PAIRS = 12


class Clocked(TraceRecorder):
    """Adds up its own time."""

    seconds = 0.0

    def step(self, *given):
        began = time.perf_counter()
        super().step(*given)
        self.seconds += time.perf_counter() - began

    def rollout(self, *given):
        began = time.perf_counter()
        super().rollout(*given)
        self.seconds += time.perf_counter() - began


class Machine:
    """Draws the same prompts under any setting."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.drafter = warm_backend(policy, SpecConfig(num_speculative_tokens=3, max_slots=SLOTS)).drafter
        self.drafter.buffer = None
        self.cost = measured_cost(self.engine(SLOTS), SLOTS, WIDEST, None)

    def engine(self, slots: int) -> RolloutEngine:
        return RolloutEngine(self.policy.model, SpecConfig(max_slots=slots), drafter=self.drafter)

    def rollout(self, slots: int, gamma: int | None, turn: int, recorder: TraceRecorder | None = None) -> float:
        """Seconds of one rollout."""
        engine = self.engine(slots)
        cost = CostModel.from_json(self.cost.to_json())
        engine.controller = GammaController(cost, WIDEST) if gamma is None else FixedGamma(gamma)
        engine.recorder = recorder
        prompts = arithmetic_prompts(self.policy.tokenizer, COMPLETIONS, seed=turn)
        engine.generate(prompts, self.policy.params, seed=(turn,))
        return engine.stats.seconds

    def trace(self, slots: int, gamma: int | None, turn: int) -> RolloutTrace:
        recorder = TraceRecorder(slots)
        self.rollout(slots, gamma, turn, recorder)
        return recorder.rollouts[0]


def validate(machine: Machine, turns: int) -> list[dict]:
    """Predicted over measured seconds of every held-out setting, by turn."""
    found = {setting: [] for setting in HELD_OUT}
    for turn in tqdm(range(turns), desc="replays", unit="turn"):
        fitted = [machine.trace(*setting, 2 * turn) for setting in FITTED]
        real = {setting: machine.trace(*setting, 2 * turn + 1) for setting in HELD_OUT}
        costs, draft = Costs.fitted(machine.cost, fitted), acceptance(fitted)
        rates = position_rates([s for t in fitted for s in t.steps], WIDEST)
        for (slots, gamma), trace in real.items():
            predicted = replay(Work.of(trace), costs, slots, gamma, rates, draft).seconds
            found[slots, gamma].append((predicted, trace.seconds))
    return [
        {
            "slots": slots,
            "gamma": gamma,
            "predicted_s": [p for p, _ in pairs],
            "measured_s": [m for _, m in pairs],
            "ratio": statistics.median(p / m for p, m in pairs),
        }
        for (slots, gamma), pairs in found.items()
    ]


def recording(machine: Machine) -> dict:
    """Adaptive rollouts with and without a recorder that writes to a file, in turn."""
    off, on, share = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in tqdm(range(PAIRS), desc="recording", unit="pair"):
            recorder = Clocked(SLOTS, Path(folder, "trace.jsonl"))
            for given in (None, recorder) if turn % 2 else (recorder, None):
                (off if given is None else on).append(machine.rollout(SLOTS, None, 1000, given))
            share.append(recorder.seconds / on[-1])
    return {
        "off_s": off,
        "on_s": on,
        "ratio": statistics.median(a / b for a, b in zip(on, off, strict=True)),
        "recorder_share": statistics.median(share),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", required=True, help="folder of the reference policy")
    parser.add_argument("--turns", type=positive, default=3, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    machine = Machine(load_policy(args.policy, "float32", 256))
    machine.rollout(SLOTS, 3, 999)
    settings, cost = validate(machine, args.turns), recording(machine)
    table(("slots", "guessed", "predicted / measured"), [(s["slots"], s["gamma"], s["ratio"]) for s in settings])
    print(f"Recording: {cost['recorder_share']:.2%} of the rollout; with / without {cost['ratio']:.3f}")
    setup = {"completions": COMPLETIONS, "fitted_on": FITTED, "turns": args.turns, "dtype": "float32"}
    write_json(args.json, {"settings": settings, "recording": cost, "hardware": hardware(), "setup": setup})


if __name__ == "__main__":
    main()
