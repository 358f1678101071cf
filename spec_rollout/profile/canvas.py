"""A picture in two forms: a PNG file, and inline SVG whose colours and fonts are those of the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.0, 2.8
"""Inches. At this size the text is readable on a phone and no larger than the page's in two or three columns."""

INK, MUTED, LINE, OURS, PLAIN, SOFT = "#1b2733", "#66727d", "#dde4ea", "#c8385a", "#4f7aa3", "#c6d7e6"
FIXED = ("#d9a441", "#6a9f58", "#8a6bb1", "#3f9c9c", "#a0724f")
RAMP = ("#edf1f5", "#f7dde2", "#f0bcc7", "#e699ab", "#da768f", "#cc5474", "#b0365a", "#8c2346")
"""γ = 0, 1 … 7."""

LIGHT = {"ink": INK, "muted": MUTED, "line": LINE, "ours": OURS, "plain": PLAIN, "soft": SOFT}
LIGHT |= {f"fixed{i}": colour for i, colour in enumerate(FIXED)} | {f"ramp{i}": c for i, c in enumerate(RAMP)}
DARK = {
    "ink": "#e6ebf0",
    "muted": "#93a1ae",
    "line": "#2c3742",
    "ours": "#ff6f8f",
    "plain": "#7fb0df",
    "soft": "#2b4257",
    "fixed0": "#e6b85c",
    "fixed1": "#8cc47a",
    "fixed2": "#b195d8",
    "fixed3": "#62c3c3",
    "fixed4": "#c99a75",
    "ramp0": "#26303a",
    "ramp1": "#46303b",
    "ramp2": "#643444",
    "ramp3": "#85394f",
    "ramp4": "#a5415d",
    "ramp5": "#c54c6c",
    "ramp6": "#e15c7e",
    "ramp7": "#ff7c98",
}
"""The same names in dark mode."""


@dataclass(frozen=True)
class Chart:
    """A finished picture: `svg` refers to the page's colours as CSS variables."""

    name: str
    title: str
    note: str
    svg: str


def draw(
    folder: Path, name: str, title: str, note: str, paint: Callable[[Figure], None], height: float = HEIGHT
) -> Chart:
    """Let `paint` fill a figure; write folder/name.png, and return it for a page.

    `note` says how to read it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "axes.axisbelow": True,
        "axes.edgecolor": MUTED,
        "axes.grid": True,
        "axes.labelcolor": MUTED,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "font.size": 9,
        "grid.color": LINE,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "legend.labelcolor": INK,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
    }
    with plt.rc_context(style):
        figure = plt.figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        figure.suptitle(title, fontsize=11, fontweight="bold")
        figure.savefig(folder / f"{name}.png", dpi=150, facecolor="white")
        plt.close(figure)
    return Chart(name, title, note, _inline(text.getvalue(), name, title))


def _inline(svg: str, name: str, title: str) -> str:
    """The <svg> element alone, scalable, with identifiers of its own and colours and fonts left to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{title}"', svg, count=1)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    svg = re.sub(r"font: (?:(\d+|bold) )?([\d.]+)px [^;\"]*", _font, svg)
    for colour, css in {colour: css for css, colour in LIGHT.items()}.items():
        svg = svg.replace(colour, f"var(--{css})")
    return svg.strip()


def _font(match: re.Match) -> str:
    weight, size = match.groups()
    return f"font-size: {size}px" + (f"; font-weight: {weight}" if weight else "")
