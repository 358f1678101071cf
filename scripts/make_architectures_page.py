"""For maintainers: docs/architectures.md from `spec-rollout check --architectures`: what is decoded or refused, why.

`make_architectures_page.py FILE...` takes what `--json` wrote; without files the checks run, which takes an hour or
two.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import transformers

from spec_rollout.bench.architectures import COUNTS, DIFFERENT, OWN, Finding, counts, examine_all, summary
from spec_rollout.bench.comparison import shown
from spec_rollout.bench.tiny_models import CONTEXT, VOCAB, architectures

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
MAIN = ("float32", OWN)
WAYS = (MAIN, *itertools.product(("float32", "bfloat16", "float16"), ("eager", "sdpa", "flex_attention")))
TEXT = f"""# Architectures

Every model type that `AutoModelForCausalLM` knows, made tiny from its own configuration: random weights, {VOCAB} token
ids, a context of {CONTEXT}.

- *identical*: prompts of different lengths, at T = 1, gave the same tokens without guesses and with right and random
  ones, at changing numbers of guesses and in few slots; and the log-probs of one plain pass over the whole sequence.
- *refused*: an error that names the reason, before a token is sampled.
- *not made*: transformers makes no tiny model from such sizes or not with that attention, or it needs more than token
  ids; so it was not tried.

`spec-rollout check --architectures` prints this table for the transformers that is installed; it takes minutes.
`--dtypes float32,bfloat16 --attentions eager,sdpa` does so for each pair. `scripts/make_architectures_page.py` writes
this page.
"""
GRID = """## Other dtypes and attentions

How many came to which outcome, on a CPU, where flash attention does not run. *DIFFERENT*, in fewer digits than
float32: a near-tie was decided otherwise, or log-probs are off by more than 0.3. The last column is the least share of
a model's tokens that came before a first difference."""
OTHERWISE = "Those that differ:"

Way = tuple[str, str]


def main(files: list[str]) -> int:
    transformers.logging.set_verbosity_error()
    tables = _read(files) if files else {way: examine_all(architectures(), *way) for way in WAYS}
    PAGE.write_text(page(tables), encoding="utf-8")
    print(summary(tables[MAIN]))
    return int(
        any(f.outcome == DIFFERENT for way, findings in tables.items() if way[0] == "float32" for f in findings)
    )


def _read(files: list[str]) -> dict[Way, list[Finding]]:
    tables: dict[Way, list[Finding]] = {}
    for file in files:
        for found in json.loads(Path(file).read_text(encoding="utf-8"))["findings"]:
            way = found.pop("dtype"), found.pop("attention")
            tables.setdefault(way, []).append(Finding(**found))
    return {way: tables[way] for way in WAYS if way in tables}


def page(tables: dict[Way, list[Finding]]) -> str:
    rows = ["| model type | class | outcome | reason |", "|---|---|---|---|"]
    for f in tables[MAIN]:
        model = f"`{f.model}`" if f.model else ""
        rows.append(f"| `{f.architecture}` | {model} | {f.outcome} | {f.reason.replace('|', '/')} |")
    parts = [TEXT, summary(tables[MAIN]), "", *rows, ""]
    others = {way: findings for way, findings in tables.items() if way != MAIN}
    return "\n".join([*parts, *_grid(others)] if others else parts)


def _grid(tables: dict[Way, list[Finding]]) -> list[str]:
    lines = [GRID, "", f"| dtype | attention | {' | '.join(COUNTS)} | least share |", f"|---|---|{'---:|' * 5}"]
    lines += [f"| {' | '.join(map(str, (*way, *counts(findings))))} |" for way, findings in tables.items()]
    apart = [
        f"| `{f.architecture}` | {' | '.join(way)} | {shown(f.identical_share)} | {f.reason} |"
        for way, findings in tables.items()
        for f in findings
        if f.outcome == DIFFERENT
    ]
    if apart:
        header = ["| model type | dtype | attention | the same | reason |", "|---|---|---|---:|---|"]
        lines += ["", OTHERWISE, "", *header, *apart]
    return [*lines, ""]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
