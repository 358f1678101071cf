"""For maintainers: replays beside real rollouts at settings that no cost was fitted on, and what recording takes.

python scripts/validate_traces.py --policy DIR --json benchmarks/cpu-small-simulate.json
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from spec_rollout.backends.calibration import measured_cost
from spec_rollout.backends.trace import HEAD, NGRAMS, RolloutTrace, TraceRecorder
from spec_rollout.bench.workload import (
    Policy,
    arithmetic_prompts,
    hardware,
    load_policy,
    load_prompts,
    positive,
    table,
    write_json,
)
from spec_rollout.config import SpecConfig
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.gamma import CostModel, FixedGamma, GammaController
from spec_rollout.profile.measuring import warm_backend
from spec_rollout.simulate.replay import Costs, Work, acceptance, position_rates, replay

COMPLETIONS, SLOTS, WIDEST = 48, 48, SpecConfig().max_num_speculative_tokens
WARM_UP_S = 600
"""More than the draft's first rollouts and trainings take."""


class Setting(NamedTuple):
    """Who guesses, slots, and guesses per step; None is the adaptive number."""

    source: str
    slots: int
    gamma: int | None


PLAIN = "plain"
FITTED = (
    *(Setting(PLAIN, 16, 0), Setting(PLAIN, 48, 0)),
    *(Setting(source, *given) for source in (HEAD, NGRAMS) for given in ((16, None), (48, 3), (48, None))),
)
"""Rollouts that the costs are fitted on: those of a source on its own and the plain ones."""
HELD_OUT = (
    *(Setting(PLAIN, 8, 0), Setting(PLAIN, 24, 0)),
    *(Setting(source, *given) for source in (HEAD, NGRAMS) for given in ((8, None), (24, None), (24, 5), (32, 1))),
)
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
        config = SpecConfig(num_speculative_tokens=3, max_slots=SLOTS)
        prompts = load_prompts(policy.tokenizer, "arithmetic")
        backend, _ = warm_backend(policy, prompts, config, time.perf_counter() + WARM_UP_S)
        backend.drafter.collector.buffer = None
        self.drafters = {PLAIN: None, HEAD: backend.drafter, NGRAMS: backend.ngrams.drafter}
        self.costs = {s: measured_cost(self.engine(s, SLOTS), SLOTS, WIDEST, None) for s in (HEAD, NGRAMS)}

    def engine(self, source: str, slots: int) -> RolloutEngine:
        return RolloutEngine(
            self.policy.model, SpecConfig(max_slots=slots), drafter=self.drafters[source], controller=FixedGamma(0)
        )

    def rollout(self, setting: Setting, turn: int, recorder: TraceRecorder | None = None) -> float:
        """Seconds of one rollout."""
        source, slots, gamma = setting
        engine = self.engine(source, slots)
        engine.controller = FixedGamma(gamma or 0)
        if gamma is None:
            engine.controller = GammaController(CostModel.from_json(self.costs[source].to_json()), WIDEST)
        engine.recorder = recorder
        prompts = arithmetic_prompts(self.policy.tokenizer, COMPLETIONS, seed=turn)
        engine.generate(prompts, self.policy.params, seed=(turn,))
        return engine.stats.seconds

    def trace(self, setting: Setting, turn: int) -> RolloutTrace:
        recorder = TraceRecorder(setting.slots)
        self.rollout(setting, turn, recorder)
        return recorder.rollouts[0]


def validate(machine: Machine, turns: int) -> list[dict]:
    """Predicted and measured seconds and steps of every held-out setting, by turn. Rollouts to fit on and to predict
    take turns, so that a slow moment of the machine meets both."""
    found = {setting: [] for setting in HELD_OUT}
    for turn in tqdm(range(turns), desc="replays", unit="turn"):
        order = [s for pair in itertools.zip_longest(FITTED, HELD_OUT) for s in pair if s]
        traces = {s: machine.trace(s, 2 * turn + (s in HELD_OUT)) for s in (order if turn % 2 else reversed(order))}
        fitted, real = ({s: traces[s] for s in settings} for settings in (FITTED, HELD_OUT))
        known = {source: [t for s, t in fitted.items() if s.source in (PLAIN, source)] for source in (HEAD, NGRAMS)}
        costs = {source: Costs.fitted(machine.costs[source], traces) for source, traces in known.items()}
        for setting, trace in real.items():
            source = HEAD if setting.source == PLAIN else setting.source
            rates = position_rates([s for t in known[source] for s in t.steps], WIDEST)
            draft = acceptance(known[source])
            predicted = replay(Work.of(trace), costs[source], setting.slots, setting.gamma, rates, draft)
            found[setting].append((predicted, trace))
    return [
        setting._asdict()
        | {
            "predicted_s": [p.seconds for p, _ in pairs],
            "measured_s": [m.seconds for _, m in pairs],
            "ratio": statistics.median(p.seconds / m.seconds for p, m in pairs),
            "steps_ratio": statistics.median(len(p.steps) / len(m.steps) for p, m in pairs),
        }
        for setting, pairs in found.items()
    ]


def recording(machine: Machine) -> dict:
    """Adaptive rollouts with and without a recorder that writes to a file, in turn."""
    off, on, share, setting = [], [], [], Setting(HEAD, SLOTS, None)
    with tempfile.TemporaryDirectory() as folder:
        for turn in tqdm(range(PAIRS), desc="recording", unit="pair"):
            recorder = Clocked(SLOTS, Path(folder, "trace.jsonl"))
            for given in (None, recorder) if turn % 2 else (recorder, None):
                (off if given is None else on).append(machine.rollout(setting, 1000, given))
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
    machine.rollout(Setting(HEAD, SLOTS, 3), 999)
    settings, cost = validate(machine, args.turns), recording(machine)
    columns = ("source", "slots", "gamma", "ratio", "steps_ratio")
    table(columns, [[s[name] for name in columns] for s in settings])
    print(f"Recording: {cost['recorder_share']:.2%} of the rollout; with / without {cost['ratio']:.3f}")
    setup = {"completions": COMPLETIONS, "fitted_on": FITTED, "turns": args.turns, "dtype": "float32"}
    write_json(args.json, {"settings": settings, "recording": cost, "hardware": hardware(), "setup": setup})


if __name__ == "__main__":
    main()
