"""Imports point one way, in the order that `ORDER` gives, and never in a circle."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import spec_rollout

PACKAGE = Path(spec_rollout.__file__).parent
ORDER = (
    ("config",),
    ("records",),
    ("gamma", "engine"),
    ("draft",),
    ("tasks", "backends"),
    ("training",),
    ("bench",),
    ("experiments", "simulate"),
    ("profile", "doctor"),
    ("cli",),
)
"""The parts of the package from the lowest up; those that stand side by side do not know each other."""

BELOW = {part: {low for below in ORDER[:level] for low in below} for level, side in enumerate(ORDER) for part in side}
BELOW["__init__"] = {"config", "records", "engine", "training"}
BELOW["engine"] = {"config", "records"}
"""What each part may import, itself aside."""

ABOVE = {"scripts", "tests", "trainers"}
OPTIONAL = {"deepspeed", "matplotlib", "peft", "vllm"}
"""Imported inside the functions that use them, so that the rest works without them."""

TRL_HOSTS = {"tasks", "training", "experiments"}


def imports(source: str) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted name, whether it waits for a function) of each import; those for typing alone count as waiting."""

    def visit(node: ast.AST, delayed: bool) -> Iterator[tuple[int, str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, delayed) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}", delayed) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level, delayed
        waits = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        for child in ast.iter_child_nodes(node):
            yield from visit(child, delayed or waits)

    yield from visit(ast.parse(source), delayed=False)


def wrong_arrows(part: str, source: str) -> list[str]:
    """The imports of `source`, a module in `part` of the package, that the design forbids."""
    wrong = []
    for line, name, delayed in imports(source):
        top, *rest = name.split(".")
        if not top:
            wrong.append(f"line {line}: a relative import; write the whole name")
        elif top == "spec_rollout":
            target = rest[0] if rest and rest[0] in BELOW else "records"  # the package itself offers names lazily
            if target != part and target not in BELOW[part]:
                wrong.append(f"line {line}: {part} must not import {name}")
        elif top in ABOVE:
            wrong.append(f"line {line}: the package must not import {top}, which stands above it")
        elif part == "gamma" and top not in sys.stdlib_module_names | {"numpy"}:
            wrong.append(f"line {line}: gamma is plain Python and NumPy, not {top}")
        elif top in OPTIONAL and not delayed:
            wrong.append(f"line {line}: import {top} inside the function that uses it")
        elif top == "trl" and part not in TRL_HOSTS:
            wrong.append(f"line {line}: TRL belongs to {' and '.join(sorted(TRL_HOSTS))}, not to {part}")
    return wrong


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    assert part_of(path) in BELOW, f"{path.name} is in no part of the package that the design names"
    assert wrong_arrows(part_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("engine", "from spec_rollout.gamma import GammaController"),
        ("engine", "def f():\n    from spec_rollout.draft.eagle import EagleHead"),
        ("engine", "import spec_rollout.backends.embedded"),
        ("gamma", "from spec_rollout.engine.rows import Rows"),
        ("gamma", "import torch"),
        ("records", "from spec_rollout import engine"),
        ("records", "if TYPE_CHECKING:\n    from spec_rollout.engine.rows import Rows"),
        ("training", "from spec_rollout.cli import main"),
        ("training", "from spec_rollout.bench.bench import main"),
        ("draft", "from .eagle import EagleHead"),
        ("draft", "from trl import GRPOTrainer"),
        ("backends", "import vllm"),
        ("profile", "import matplotlib.pyplot as plt"),
        ("backends", "try:\n    from vllm import LLM\nexcept ImportError:\n    LLM = None"),
        ("cli", "from scripts.make_reference_policy import main"),
    ],
)
def test_a_wrong_arrow_is_found(part, source):
    assert len(wrong_arrows(part, source)) == 1


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("backends", "def load():\n    from vllm import LLM"),
        ("training", "from trl import GRPOTrainer\nfrom spec_rollout.backends.embedded import EmbeddedBackend"),
        ("gamma", "import math\nimport numpy as np\nfrom spec_rollout.records import StepStats"),
        ("cli", "from spec_rollout import SpecConfig"),
    ],
)
def test_a_right_arrow_passes(part, source):
    assert wrong_arrows(part, source) == []


def circles(sources: dict[str, str]) -> list[str]:
    """The modules of a circle of imports in `sources`, by dotted name; empty without one. That the package itself, or
    a part of it, offers a name from within is no circle."""
    graph = {
        module: {
            next((known for known in (name, name.rpartition(".")[0]) if known in sources and known != module), module)
            for _, name, _ in imports(source)
        }
        - {module}
        for module, source in sources.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_imports_go_in_a_circle():
    sources = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert len(sources) > 100 and circles(sources) == []


def test_a_circle_is_found():
    sources = {"a.b": "from a.c import d", "a.c": "if TYPE_CHECKING:\n    from a.b import e"}
    assert set(circles(sources)) == {"a.b", "a.c"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("spec_rollout", {"torch", "transformers", "trl", "datasets", *OPTIONAL}),
        ("spec_rollout.cli", {"torch", "transformers", "trl", "datasets", *OPTIONAL}),
        ("spec_rollout.gamma", {"torch", "transformers", "trl", *OPTIONAL}),
        ("spec_rollout.engine.engine", {"trl", "datasets", *OPTIONAL}),
    ],
)
def test_an_import_stays_light(module, absent):
    code = f"import sys, {module}; print(*sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert done.stdout.split() == []


def test_the_package_offers_its_public_names():
    """Each from its own home, and `from spec_rollout import *` and `dir` know all of them."""
    assert set(spec_rollout.__all__) <= set(dir(spec_rollout)) and set(spec_rollout._HOMES) < set(spec_rollout.__all__)
    assert spec_rollout.__all__ == sorted(spec_rollout.__all__)
    for name in spec_rollout.__all__:
        assert getattr(spec_rollout, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'SpecGRPOTrainr'"):
        spec_rollout.SpecGRPOTrainr  # noqa: B018
