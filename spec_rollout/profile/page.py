"""One self-contained page: styles, pictures and figures in a single file, readable on a phone and in the dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from spec_rollout.profile.canvas import DARK, LIGHT, Chart

STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 40px 0 12px; }
.meta { color: var(--muted); margin: 0; overflow-wrap: anywhere; }
.warning { border-left: 4px solid var(--fixed0); padding: 8px 12px; background: var(--card); margin: 20px 0 0; }
.note { color: var(--muted); margin: 12px 0 0; max-width: 90ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 0; }
.tile, figure, .panel { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 14px 16px; max-width: 400px; }
.tile b { display: block; font-size: 26px; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: 14px; }
.advice { padding: 6px 20px 6px 36px; margin: 0; }
.advice li { margin: 10px 0; max-width: 90ch; }
.charts { columns: 340px 3; column-gap: 16px; }
figure { margin: 0 0 16px; padding: 14px 16px 12px; break-inside: avoid; }
figcaption b { display: block; }
figcaption span { color: var(--muted); font-size: 14px; line-height: 1.4; display: block; margin-bottom: 8px; }
figure svg { display: block; width: 100%; height: auto; font-family: inherit; }
.panel { overflow-x: auto; padding: 4px 16px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--muted); font-weight: 600; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
pre { margin: 0; padding: 12px 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, "SFMono-Regular", Menlo, "DejaVu Sans Mono", monospace; }
"""


def write_page(
    path: Path,
    title: str,
    meta: str,
    charts: Sequence[Chart],
    *,
    warning: str | None = None,
    note: str | None = None,
    tiles: Sequence[tuple[str, str]] = (),
    advice: Sequence[str] = (),
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence]]] = (),
    code: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the page: a heading, what it was measured on, what a reader must know, the main figures, advice, pictures,
    tables, text to paste.

    `tiles` are (figure, label), `tables` (heading, header, rows), `code` (heading, text).
    """
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="meta">{escape(meta)}</p>']
    if warning:
        parts.append(f'<p class="warning">{escape(warning)}</p>')
    if note:
        parts.append(f'<p class="note">{escape(note)}</p>')
    if tiles:
        cells = "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in tiles)
        parts.append(f'<div class="tiles">{cells}</div>')
    if advice:
        items = "".join(f"<li>{escape(text)}</li>" for text in advice)
        parts.append(f'<h2>What it says</h2><div class="panel"><ol class="advice">{items}</ol></div>')
    if charts:
        parts.append(f'<h2>Pictures</h2><div class="charts">{"".join(map(_figure, charts))}</div>')
    parts += [f'<h2>{escape(h)}</h2><div class="panel">{_table(head, rows)}</div>' for h, head, rows in tables]
    parts += [f'<h2>{escape(h)}</h2><div class="panel"><pre>{escape(text)}</pre></div>' for h, text in code]
    path.write_text(_document(title, "\n".join(parts)), encoding="utf-8")


def _document(title: str, body: str) -> str:
    light = _variables({**LIGHT, "page": "#f5f7f9", "card": "#ffffff"})
    dark = _variables({**DARK, "page": "#12181e", "card": "#1a222a"})
    style = f":root {{ color-scheme: light dark; {light} }}\n"
    style += f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}{STYLE}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{style}</style></head>\n'
        f"<body><main>{body}</main></body></html>\n"
    )


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def _figure(chart: Chart) -> str:
    caption = f"<figcaption><b>{escape(chart.title)}</b><span>{escape(chart.note)}</span></figcaption>"
    return f'<figure id="{chart.name}">{caption}{chart.svg}</figure>'


def _table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(number(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def number(value: object) -> str:
    """As a person writes it: three digits, a dash for nothing."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
