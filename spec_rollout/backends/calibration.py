"""Measured seconds of target passes and guesses on this device, kept on disk between runs."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from spec_rollout.backends.kept_seconds import path_of, read, write
from spec_rollout.draft.entries import Entries
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.engine.out_of_memory import is_out_of_memory, what_to_lower
from spec_rollout.engine.rollout import Rollout
from spec_rollout.gamma.cost_model import OFF, CostModel, Measurement, ratios
from spec_rollout.records import Request, RolloutMemoryError, RolloutStats, SamplingParams

SHORT, LONG = 64, 1024
"""Tokens of context at which passes are timed; the difference is what attention costs per token."""
LONG_ENTRIES = 8192
"""Most cache entries, over all rows, that the long context is measured with."""
REPEATS = 3
CELL_S = 0.05
"""A pass is timed once after its warm-up, and up to REPEATS times while it takes no longer than this in all."""
BUDGET_S = 10.0
"""Numbers of rows that would take measuring beyond this, or more memory than there is, are left out; the cost model
extends to them."""
_trusted: set[Path] = set()
"""Files that this process has written or looked into."""


def measured_cost(engine: RolloutEngine, slots: int, widest: int, folder: str | None) -> CostModel:
    """The cost model for up to `slots` rows and `widest` guesses.

    What was measured before for this policy's shape, dtype, draft, device, threads and versions comes from disk, and
    only the numbers of rows that are missing there are measured. A process that finds such a file measures a few rows
    again; where that shows that the kept passes were timed on a busy machine, a warning says so, and all are.

    Args:
        folder: keeps the measurements; None is `spec_rollout` in $XDG_CACHE_HOME or ~/.cache.
    """
    known = _measured(engine, slots, widest, folder, _verify_rows, None)
    if engine.drafter is not None:
        known += _measured(engine, slots, widest, folder, _draft_rows, engine.drafter.shape)
    return CostModel(known)


def _measured(
    engine: RolloutEngine, slots: int, widest: int, folder: str | None, measure_rows: Callable, shape: dict | None
) -> list[Measurement]:
    path = path_of(engine, widest, folder, shape)
    covered, known = read(path)
    if known and path not in _trusted:
        now = _again(engine, known, widest, measure_rows)
        slower = max(ratios(known, now), default=1.0)
        if slower > OFF:
            warnings.warn(
                f"A pass that {path} knows takes {slower:.0f} times less now: the kept times are those of a busy "
                "machine and are measured again.",
                RuntimeWarning,
                stacklevel=5,
            )
            covered, known = 0, now
    _trusted.add(path)
    if covered < slots:
        rows = [n for n in powers_of_two(slots) if n not in {m.rows for m in known}]
        try:
            found, lacking = measure(engine, rows, widest, measure_rows)
        except RolloutMemoryError:
            if not known:
                raise
            found, lacking = [], rows
        if lacking:
            _tell_lacking(lacking)
        known += found
        write(path, min([slots, *(n - 1 for n in lacking)]), known)  # the others are tried again by the next run
    return known


def _again(
    engine: RolloutEngine, known: Sequence[Measurement], widest: int, measure_rows: Callable
) -> list[Measurement]:
    """What the least rows that are known take now; two rather than one, since a compiled rollout needs those too."""
    rows = min({m.rows for m in known}, key=lambda n: (n < 2, n))
    try:
        return measure(engine, [rows], widest, measure_rows)[0]
    except RolloutMemoryError:
        return []


def measure(
    engine: RolloutEngine, rows: Sequence[int], widest: int, measure_rows: Callable
) -> tuple[list[Measurement], list[int]]:
    """Time verbs of the decode loop, those of `measure_rows`, on batches of each of `rows` made-up rows; and the
    numbers of rows for which memory ran out.

    Raises:
        RolloutMemoryError: there is no memory for any of them.
    """
    apart = copy.copy(engine)  # the engine's cache keeps its size, and made-up rows do not count
    apart.stats = RolloutStats()
    drafter, ready = engine.drafter, engine.drafter is None or engine.drafter.ready
    if not ready:
        drafter.ready = True  # what its guesses will take is measured before they are any good
    began, found, lacking = time.perf_counter(), [], {}
    speed = 0.0  # seconds of measuring per row, so far
    try:
        with apart.target.rollout():
            token, slot = apart.target.cache_bytes
            if engine.config.compile_passes == "true":
                _compile(apart, rows, widest, measure_rows)
            for count in _coarse_first(rows):
                left = BUDGET_S - (time.perf_counter() - began)
                if found and speed * count > left:
                    continue
                start = time.perf_counter()
                try:
                    found += measure_rows(copy.copy(apart), count, widest)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    lacking[count] = error.with_traceback(None)  # which would hold on to the memory
                    continue
                speed = (time.perf_counter() - start) / count
    finally:
        if drafter is not None:
            drafter.end()
        if not ready:
            drafter.ready = False
    if lacking and not found:
        raise what_to_lower(lacking[min(lacking)], {"max_slots": min(lacking) * (token * LONG + slot)})
    return found, list(lacking)


def _tell_lacking(rows: Iterable[int]) -> None:
    warnings.warn(
        f"Memory ran out while passes of {', '.join(map(str, rows))} rows were timed: what they take is reckoned from "
        "other batches. If rollouts run out of it too, lower max_slots or max_cache_gib.",
        RuntimeWarning,
        stacklevel=5,
    )


def _compile(engine: RolloutEngine, rows: Sequence[int], widest: int, measure_rows: Callable) -> None:
    """What the compiler takes belongs to no measurement: sizes of 1 and of more are compiled apart."""
    for count in sorted({min(n, 2) for n in rows}):
        measure_rows(copy.copy(engine), count, widest)


def _draft_rows(engine: RolloutEngine, rows: int, widest: int) -> list[Measurement]:
    rollout = _made_up(engine, rows, SHORT, widest)
    return [_draft(rollout, gamma, widest) for gamma in sorted({1, min(2, widest), widest})]


def _verify_rows(engine: RolloutEngine, rows: int, widest: int) -> list[Measurement]:
    """Numbers of tokens that double, at the short context, and one and the most at the long one."""
    engine.drafter = None  # these guesses are not its
    rollout = _made_up(engine, rows, SHORT, widest)
    found = [_verify(rollout, SHORT, tokens) for tokens in powers_of_two(widest + 1)]
    long = min(LONG, (engine.target.context or LONG) - widest - 2)
    if rows * long <= LONG_ENTRIES and long >= 2 * SHORT:
        rollout = _made_up(engine, rows, long, widest)
        found += [_verify(rollout, long, tokens) for tokens in (1, widest + 1)]
    return found


def _made_up(engine: RolloutEngine, rows: int, context: int, widest: int) -> Rollout:
    """A rollout in which each row has `context` tokens; only the first SHORT of them were really prefilled."""
    engine.cache = SlotCache()
    params = SamplingParams(max_new_tokens=context - SHORT + widest + 2)
    prompt = [i % engine.target.vocab_size for i in range(SHORT)]
    rollout = engine.start([Request(i, prompt, (i, 0), params.max_new_tokens) for i in range(rows)], params)
    rollout.admit()
    if context > SHORT:
        rollout.seats.stretch(context + widest + 2)
        for buffer in (*engine.cache.keys, *engine.cache.values):
            buffer.normal_()  # pages never written to would all be read from one in the processor's cache
        rollout.rows.length[:rows] = context - 1
        rollout.rows.lengths[:rows] = context - 1
    return rollout


def _verify(rollout: Rollout, context: int, tokens: int) -> Measurement:
    rows = rollout.rows.count
    guesses = rollout.rows.tokens[:rows, : tokens - 1]

    def step():
        noise = rollout.noise(tokens)
        logits, _ = rollout.forward(guesses)
        judged = rollout.sample_and_verify(logits, noise, guesses)
        if judged is not None:
            rollout.cache.commit(judged[1].emitted)  # recurrent layers follow the guesses that came true

    return Measurement("verify", rows, tokens, context, _seconds(step, rollout.target.device))


def _draft(rollout: Rollout, gamma: int, widest: int) -> Measurement:
    noise = rollout.noise(widest + 1)[..., : rollout.noise_width]
    drafter, count = rollout.drafter, rollout.rows.count

    def step():
        if isinstance(drafter, Entries):  # it first reads what the step before left, in some row all that was guessed
            drafter.known[:count] = np.maximum(rollout.rows.lengths[:count] - (gamma + 1), 0)
        drafter.propose(rollout.rows, gamma, noise, 1.0)

    return Measurement("draft", rollout.rows.count, gamma, SHORT, _seconds(step, rollout.target.device))


def _seconds(call, device: torch.device) -> float:
    """Median of a few repeats, after one to warm up."""
    times: list[float] = []
    while len(times) < 2 or (len(times) <= REPEATS and sum(times) < CELL_S):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def powers_of_two(most: int) -> list[int]:
    """Powers of two, and `most`."""
    return sorted({*(2**i for i in range(most.bit_length())), most})


def _coarse_first(rows: Iterable[int]) -> list[int]:
    """Every other number of rows from the largest down, in ascending order, then those between them."""
    rows = sorted(rows)
    coarse = rows[::-2][::-1]
    return [*coarse, *(n for n in rows if n not in coarse)]
