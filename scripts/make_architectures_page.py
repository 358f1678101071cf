"""docs/architectures.md from `spec-rollout check --architectures`: what is decoded, and what is refused and why."""

from __future__ import annotations

from pathlib import Path

import transformers

from spec_rollout.bench.architectures import DIFFERENT, Finding, examine_all, summary
from spec_rollout.bench.tiny_models import CONTEXT, VOCAB, architectures

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
TEXT = f"""# Architectures

Every model type that `AutoModelForCausalLM` knows, made tiny from its own configuration: random weights, {VOCAB} token
ids, a context of {CONTEXT}, float32.

- *identical*: prompts of different lengths, at T = 1, gave the same tokens without guesses and with right and random
  ones, at changing numbers of guesses and in few slots; and the log-probs of one plain pass over the whole sequence.
- *refused*: an error that names the reason, before a token is sampled.
- *not made*: transformers makes no tiny model from such sizes, or it needs more than token ids; so it was not tried.

`spec-rollout check --architectures` prints this table for the transformers that is installed; it takes minutes.
`scripts/make_architectures_page.py` writes this page.
"""


def main() -> int:
    transformers.logging.set_verbosity_error()
    findings = examine_all(architectures())
    PAGE.write_text(page(findings), encoding="utf-8")
    print(summary(findings))
    return int(any(finding.outcome == DIFFERENT for finding in findings))


def page(findings: list[Finding]) -> str:
    rows = ["| model type | class | outcome | reason |", "|---|---|---|---|"]
    for f in findings:
        model = f"`{f.model}`" if f.model else ""
        rows.append(f"| `{f.architecture}` | {model} | {f.outcome} | {f.reason.replace('|', '/')} |")
    return "\n".join([TEXT, summary(findings), "", *rows, ""])


if __name__ == "__main__":
    raise SystemExit(main())
