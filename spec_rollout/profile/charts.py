"""The pictures of a profile, each from its part of profile.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from spec_rollout.profile import panels
from spec_rollout.profile.canvas import HEIGHT, Chart, draw


class Picture(NamedTuple):
    """`data` finds in profile.json what `paint` draws; without any there is no picture."""

    name: str
    title: str
    note: str
    data: Callable[[dict], Any]
    paint: Callable
    height: float = HEIGHT


def _by_position(figures: dict) -> dict[str, list[dict]] | None:
    """Of the draft head, and of guesses from earlier rollouts if there are such."""
    table = (figures.get("ngrams") or {}).get("by_position")
    found = {"draft head": figures["acceptance"]["by_position"], "earlier rollouts": table}
    return found if any(found.values()) else None


PICTURES = (
    Picture(
        "throughput",
        "Throughput",
        "Tokens per second by rows in the batch; medians over the turns. Hollow: what the controller's costs predict.",
        lambda figures: figures["throughput"],
        panels.throughput,
    ),
    Picture(
        "speedup",
        "Speed-up over plain decoding",
        "Medians of the ratios within a turn; the numbers are the adaptive one's. Below the line, guessing costs more "
        "than it brings.",
        lambda figures: [r for r in figures["throughput"] if r["speedup_vs_plain"] and r["sampler"] != "plain"],
        panels.speedup,
    ),
    Picture(
        "gamma_map",
        "Tokens guessed per step",
        "The controller's choice by rows and context, from measured times and acceptance; below it, the predicted "
        "speed-up.",
        lambda figures: figures["gamma_map"],
        panels.gamma_map,
    ),
    Picture(
        "rollout",
        "One adaptive rollout through time",
        "As rows finish, more is guessed. The last panel adds up what plain decoding would have taken longer.",
        lambda figures: figures["rollout"],
        panels.rollout,
        4.3,
    ),
    Picture(
        "acceptance_by_position",
        "Acceptance by position",
        "How often a guess comes true, of the times that all before it did.",
        _by_position,
        panels.by_position,
    ),
    Picture(
        "acceptance_by_place",
        "Acceptance by place in the answer",
        "Tokens per row and pass with guesses, by where in the answer the pass began.",
        lambda figures: figures["acceptance"]["by_place"],
        panels.by_place,
    ),
    Picture(
        "acceptance_by_prompt",
        "Acceptance by length of the prompt",
        "Tokens per row and pass, fixed numbers of guesses, quarters of the completions.",
        lambda figures: figures["acceptance"]["by_prompt_tokens"],
        panels.by_prompt,
    ),
    Picture(
        "time_split",
        "Where the time goes",
        "On a GPU the host waits for the device within the sampling.",
        lambda figures: figures["time_split"],
        panels.time_split,
    ),
    Picture(
        "limits",
        "Policy passes against the device's limit",
        "The limit is the longer of reading the weights, keys and values at the speed of a copy, and of the "
        "arithmetic at that of a matrix product.",
        lambda figures: figures["limits"]["passes"],
        panels.limits,
    ),
    Picture(
        "memory",
        "Memory",
        "What the rollouts hold, in MiB.",
        lambda figures: figures["memory"],
        panels.memory,
    ),
)


def profile_charts(figures: dict, folder: Path) -> list[Chart]:
    """Those for which there is something to draw; PNGs are written to `folder`."""
    found = [(picture, picture.data(figures)) for picture in PICTURES]
    return [
        draw(folder, p.name, p.title, p.note, lambda figure, p=p, data=data: p.paint(figure, data), p.height)
        for p, data in found
        if data
    ]
