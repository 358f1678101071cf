"""Measured seconds of target passes and guesses on this device, kept on disk between runs."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import torch

from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.rollout import Rollout
from spec_rollout.gamma.cost_model import CostModel, Measurement
from spec_rollout.records import Request, RolloutStats, SamplingParams

PROMPT = 64
REPEATS = 3
BUDGET_S = 3.0
"""The largest batches are dear on a slow device: past this, measuring ends once a quarter of the slots is covered."""


def measured_cost(engine: RolloutEngine, slots: int, widest: int, folder: str | None) -> CostModel:
    """The cost model for up to `slots` rows and `widest` guesses, from disk if this shape was measured before."""
    path = _cache_path(engine, slots, widest, folder)
    if path.exists():
        try:
            return CostModel([Measurement(**m) for m in json.loads(path.read_text())])
        except (ValueError, TypeError):
            path.unlink(missing_ok=True)  # written by another version
    measurements = measure(engine, slots, widest)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(f".{os.getpid()}")
    staging.write_text(json.dumps([vars(m) for m in measurements]))
    staging.replace(path)
    return CostModel(measurements)


def measure(engine: RolloutEngine, slots: int, widest: int) -> list[Measurement]:
    """Time the decode loop's own verbs on made-up rows, smallest batches first."""
    params = SamplingParams(max_new_tokens=widest + 2)
    prompt = [i % engine.target.vocab_size for i in range(PROMPT)]
    requests = [Request(i, prompt, (i, 0), params.max_new_tokens) for i in range(slots)]
    measurements: list[Measurement] = []
    began = time.perf_counter()
    stats, engine.stats = engine.stats, RolloutStats()  # made-up rows do not count
    with engine.target.rollout():
        rollout = Rollout(engine, requests, params)
        rollout.admit()
        for rows in batch_sizes(slots):
            rollout.rows.count = rows
            measurements += _measure_rows(engine, rollout, rows, widest)
            if time.perf_counter() - began > BUDGET_S and rows >= slots // 4:
                break
    engine.stats = stats
    return measurements


def _measure_rows(engine: RolloutEngine, rollout: Rollout, rows: int, widest: int) -> list[Measurement]:
    found = []
    for tokens in sorted({1, 2, 3, *(t for t in (4, 6, 8, 12) if t <= widest), widest + 1}):
        guesses = rollout.rows.tokens[:rows, : tokens - 1]

        def verify(guesses=guesses, tokens=tokens):
            noise = rollout.noise(tokens)
            logits, _ = rollout.forward(guesses)
            rollout.sample_and_verify(logits, noise, guesses)

        found.append(Measurement("verify", rows, tokens, PROMPT, _seconds(verify, engine.target.device)))
    if engine.drafter is not None:
        noise = rollout.noise(widest + 1)
        for gamma in sorted({1, min(2, widest), widest}):

            def draft(gamma=gamma):
                engine.drafter.propose(rollout.rows, gamma, noise, 1.0)

            found.append(Measurement("draft", rows, gamma, PROMPT, _seconds(draft, engine.target.device)))
    return found


def _seconds(call, device: torch.device) -> float:
    """Median of a few repeats, after one to warm up."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[REPEATS // 2]


def batch_sizes(slots: int) -> list[int]:
    """Numbers of rows to measure at: powers of two up to `slots`, and `slots`."""
    return sorted({*(2**i for i in range(slots.bit_length()) if 2**i <= slots), slots})


def _cache_path(engine: RolloutEngine, slots: int, widest: int, folder: str | None) -> Path:
    device = engine.target.device
    config = engine.target.config.to_dict()
    shape = {k: v for k, v in config.items() if isinstance(v, int | float) and not k.endswith("token_id")}
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}-{torch.get_num_threads()}"
    head = None if engine.drafter is None else engine.drafter.head.config.to_dict()
    key = [
        type(engine.target.model).__name__,
        shape,
        str(engine.target.dtype),
        where,
        torch.__version__,
        slots,
        widest,
        head,
    ]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    base = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "spec_rollout"
    return base / f"cost-{digest}.json"
