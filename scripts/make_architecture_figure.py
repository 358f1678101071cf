"""For maintainers: the picture in docs/architecture.md, from the package's imports and docstrings.

python scripts/make_architecture_figure.py            # draws docs/architecture.svg
python scripts/make_architecture_figure.py --check    # writes nothing; exit status 1 if the picture is another
"""

import argparse
import ast
import textwrap
from collections.abc import Iterator
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE, PICTURE = ROOT / "spec_rollout", ROOT / "docs" / "architecture.svg"
WIDTH, HEIGHT, GAP, SIDE = 350, 66, 34, 20
"""Of a room, between rooms, and at the edge of the picture, in pixels."""
LETTERS, LINES = 48, 2
"""Most letters in a line of a room, and most lines."""

Graph = dict[str, set[str]]


def rooms() -> dict[str, str]:
    """The parts of the package, and the first sentence of each one's docstring."""
    parts = {path.parent.name: path for path in PACKAGE.glob("*/__init__.py")}
    parts |= {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    return {name: _first_sentence(path) for name, path in sorted(parts.items())}


def _first_sentence(path: Path) -> str:
    sentence = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split(". ")[0].split(".\n")[0]
    if not 1 <= len(textwrap.wrap(sentence, LETTERS)) <= LINES:
        raise SystemExit(
            f"The docstring of {path.relative_to(ROOT)} begins with a sentence of {len(sentence)} letters: write one, "
            f"of at most {LINES} lines of {LETTERS}, which the picture has room for."
        )
    return sentence


def imported(names: set[str]) -> Graph:
    """What each of the rooms `names` imports."""
    graph: Graph = {name: set() for name in names}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room in names:
            graph[room] |= {name for name in _imports(path) if name in names and name != room}
    return graph


def _imports(path: Path) -> Iterator[str]:
    """Second parts of the dotted names that begin with the package's, in import statements and `import_module`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = [node.value]
        yield from (name.split(".")[1] for name in found if name.startswith(f"{PACKAGE.name}."))


def reduced(graph: Graph) -> Graph:
    """Without the arrows that a longer way replaces."""
    below: Graph = {}
    for name in TopologicalSorter(graph).static_order():
        below[name] = graph[name].union(*(below[other] for other in graph[name]))
    return {name: {to for to in tos if all(to not in below[via] for via in tos)} for name, tos in graph.items()}


def placed(graph: Graph) -> dict[str, tuple[float, int]]:
    """Column, 0 to 1, and level of each room: a level above all that it imports; alone there, above their middle."""
    level: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        level[name] = max((level[to] + 1 for to in graph[name]), default=0)
    place: dict[str, tuple[float, int]] = {}
    for height in sorted(set(level.values())):
        side = sorted(name for name in graph if level[name] == height)
        for column, name in enumerate(side):
            under = [place[to][0] for to in graph[name]]
            middle = sum(under) / len(under) if under else 0.5
            place[name] = (column / (len(side) - 1) if len(side) > 1 else middle), height
    return place


def drawn() -> str:
    """The picture, as SVG."""
    texts = rooms()
    graph = reduced(imported(set(texts)))
    place = placed(graph)
    top = max(level for _, level in place.values())
    width, height = 2 * (WIDTH + SIDE) + GAP, (top + 1) * (HEIGHT + GAP) - GAP + 2 * SIDE
    corner = {
        name: (round(SIDE + column * (WIDTH + GAP)), SIDE + (top - level) * (HEIGHT + GAP))
        for name, (column, level) in place.items()
    }
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="Helvetica, Arial, sans-serif">',
        "<title>The rooms of spec_rollout; an arrow leads from a room to one that it imports</title>",
        '<defs><marker id="tip" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
        '<path d="M0,0 L9,4 L0,8 z" fill="#57606a"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for name, others in sorted(graph.items()):
        lines += [_arrow(corner[name], corner[other]) for other in sorted(others)]
    for name, (x, y) in sorted(corner.items()):
        lines += _box(x, y, name, texts[name])
    return "\n".join([*lines, "</svg>", ""])


def _arrow(source: tuple[int, int], target: tuple[int, int]) -> str:
    """From the lower edge of one room to the upper edge of another, which it meets where they are nearest."""
    middle = WIDTH // 2
    lean = max(-middle // 2, min(middle // 2, (source[0] - target[0]) // 4))
    ends = source[0] + middle - lean, source[1] + HEIGHT, target[0] + middle + lean, target[1]
    x1, y1, x2, y2 = ends
    return f'<path d="M{x1},{y1} L{x2},{y2}" stroke="#57606a" stroke-width="1.5" marker-end="url(#tip)"/>'


def _box(x: int, y: int, name: str, text: str) -> list[str]:
    rows = textwrap.wrap(text.rstrip("."), LETTERS)
    words = "".join(
        f'<tspan x="{x + 12}" dy="{17 if number else 20}">{escape(row)}</tspan>' for number, row in enumerate(rows)
    )
    return [
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#f6f8fa" stroke="#57606a"/>',
        f'<text x="{x + 12}" y="{y + 20}" font-size="15" font-weight="bold" fill="#1f2328">{name}</text>',
        f'<text y="{y + 20}" font-size="12" fill="#424a53">{words}</text>',
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the picture is another")
    check, made = parser.parse_args().check, drawn()
    stale = not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != made
    if stale and not check:
        PICTURE.write_text(made, encoding="utf-8")
    print(f"{PICTURE.name} {('differs' if check else 'drawn') if stale else 'is as the package is'}")
    return int(check and stale)


if __name__ == "__main__":
    raise SystemExit(main())
