"""The page of a profile: profile.json for a reader."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from spec_rollout.profile.canvas import Chart
from spec_rollout.profile.page import number, write_page
from spec_rollout.profile.panels import NAMES

ENGINES = {"embedded": "the embedded engine", "vllm": "vLLM"}


def write_profile_page(path: Path, figures: dict, charts: Sequence[Chart]) -> None:
    """Write the page of `figures`, as they stand in profile.json."""
    cautions = {"warning": warning(figures), "note": figures["left_out"]}
    write_page(path, "Rollout profile", _meta(figures), charts, **cautions, **_parts(figures))


def warning(figures: dict) -> str | None:
    """What a reader must know if the measurement was cut short."""
    if figures["complete"]:
        return None
    cause = "Interrupted" if figures["interrupted"] else "The time was over"
    return f"{cause} before every sampler had run at every batch size: what is here was measured until then."


def schedule_text(schedule: dict | None) -> str:
    """To be pasted, where there is one."""
    return json.dumps(schedule) if schedule else "Guessing pays at no batch size: leave speculative_config out."


def _meta(figures: dict) -> str:
    setup, device = figures["setup"], figures["hardware"]
    count = setup["draft_rollouts"]
    draft = setup["draft_model"] or f"a draft that learned from {count} rollout{'s' * (count != 1)}"
    threads = f"{device['threads']} thread{'s' * (device['threads'] > 1)}"
    return (
        f"{setup['policy']} · on {ENGINES[setup['rollout_backend']]} · {setup['dtype']} · prompts: "
        f"{setup['prompts']} · {draft} · {device['device']}, {threads} · torch {device['torch']} · "
        f"{setup['date']}"
    )


def _parts(figures: dict) -> dict:
    """Tiles, advice, table and schedule."""

    def rows_of(row: dict) -> str:
        return f"{row['batch_size']} row{'s' * (row['batch_size'] > 1)}"

    adaptive = [row for row in figures["throughput"] if row["sampler"] == "adaptive"]
    tiles = [
        (f"{number(row['speedup_vs_plain'])}\u00a0×", f"plain decoding at {rows_of(row)}")
        for row in adaptive
        if row["speedup_vs_plain"]
    ]
    if adaptive:
        best = max(adaptive, key=lambda row: row["tokens_per_s"])
        tiles.append((number(best["tokens_per_s"]), f"tokens per second at {rows_of(best)}"))
        tiles.append((number(best["mean_acceptance_length"]), "tokens per row and pass with guesses"))
    columns = {
        "rows": "batch_size",
        "sampler": "sampler",
        "guessed": "gamma",
        "tokens/s": "tokens_per_s",
        "least": "tokens_per_s_min",
        "most": "tokens_per_s_max",
        "predicted": "predicted_tokens_per_s",
        "× plain": "speedup_vs_plain",
        "acceptance length": "mean_acceptance_length",
        "turns": "turns",
    }
    named = [row | {"sampler": NAMES.get(row["sampler"], row["sampler"])} for row in figures["throughput"]]
    rows = [[row[key] for key in columns.values()] for row in named]
    return {
        "tiles": tiles,
        "advice": [item["text"] for item in figures["advice"]],
        "tables": [("Every sampler at every batch size", list(columns), rows)],
        "code": [("The schedule for vLLM's speculative_config", schedule_text(figures["vllm_schedule"]))],
    }
