"""`spec-rollout check --architectures`: every causal language model that transformers can make tiny, decoded with and
without speculation: the same tokens, or a clear refusal."""

from __future__ import annotations

import argparse
import itertools
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel

from spec_rollout.bench.tiny_models import CONTEXT, VOCAB, architectures, make_tiny
from spec_rollout.bench.workload import table, write_json
from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter, RandomDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.probe import REMEDY
from spec_rollout.records import Completion, SamplingParams, StepStats, UnsupportedModelError

PROMPTS = [[1, 2, 3], [1, 2, 3], [5], [*range(7, 19)], [3, 3]]
PARAMS = SamplingParams(max_new_tokens=16)
GAMMAS = (3, 0, 7, 1)
LOGPROB_ERROR = 1e-3
IDENTICAL, REFUSED, DIFFERENT, NOT_MADE = "identical", "refused", "DIFFERENT", "not made"


@dataclass
class Finding:
    """What became of one architecture; `reason` says why it is not identical."""

    architecture: str
    model: str
    outcome: str
    reason: str = ""


class Changing:
    """Another γ in every step."""

    def __init__(self):
        self.gammas = itertools.cycle(GAMMAS)

    def choose(self, batch_size: int, context: int) -> int:
        return next(self.gammas)

    def observe(self, stats: StepStats) -> None:
        pass


def examine(name: str, dtype: torch.dtype = torch.float32, **options) -> Finding:
    """Make a tiny model of type `name` and decode it."""
    try:
        model = make_tiny(name, **options).to(dtype)
        with torch.no_grad():
            model(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False)
    except Exception as error:  # whatever a configuration of these sizes runs into
        return Finding(name, "", NOT_MADE, _first_line(error))
    kind = type(model).__name__
    try:
        reason = _difference(model)
    except ValueError as error:
        return Finding(name, kind, REFUSED, _first_line(error))
    except FloatingPointError as error:  # random weights that overflow
        return Finding(name, kind, NOT_MADE, _first_line(error))
    return Finding(name, kind, DIFFERENT if reason else IDENTICAL, reason)


def _difference(model: PreTrainedModel) -> str:
    """How speculation changes what is decoded; empty if it does not."""
    plain = RolloutEngine(model, SpecConfig(num_speculative_tokens=0)).generate(PROMPTS, PARAMS)
    for drafter, slots in ((OracleDrafter(plain), 64), (RandomDrafter(), 2)):
        engine = RolloutEngine(model, SpecConfig(max_slots=slots), drafter=drafter, controller=Changing())
        found = engine.generate(PROMPTS, PARAMS)
        if [c.token_ids for c in found] != [c.token_ids for c in plain]:
            return f"other tokens with {type(drafter).__name__}"
    error = max(_error(model, prompt, c) for prompt, c in zip(PROMPTS, plain, strict=True))
    return f"log-probs off by {error:.1e}" if error > LOGPROB_ERROR else ""


@torch.no_grad()
def _error(model: PreTrainedModel, prompt: list[int], completion: Completion) -> float:
    """How far the log-probs are from those of one plain pass over the whole sequence."""
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    z = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    wanted = z.gather(1, ids[0, len(prompt) :, None])[:, 0]
    return float((torch.tensor(completion.logprobs) - wanted).abs().max())


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).removesuffix(REMEDY).split())
    text = text if isinstance(error, UnsupportedModelError) else f"{type(error).__name__}: {text}"
    return text if len(text) <= 200 else f"{text[:200]}…"


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    names = args.only.split(",") if args.only else architectures()
    unknown = sorted(set(names) - set(architectures()))
    if unknown:
        raise SystemExit(f"--only {','.join(unknown)}: AutoModelForCausalLM of transformers knows no such model type.")
    findings = examine_all(names)
    table(("architecture", "model", "outcome", "reason"), [list(asdict(f).values()) for f in findings])
    print(summary(findings))
    write_json(args.json, {"transformers": version("transformers"), "findings": [asdict(f) for f in findings]})
    return int(any(finding.outcome == DIFFERENT for finding in findings))


def examine_all(names: list[str]) -> list[Finding]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [examine(name) for name in tqdm(names, desc="architectures", unit="model")]


def summary(findings: list[Finding]) -> str:
    counts = {kind: sum(f.outcome == kind for f in findings) for kind in (IDENTICAL, REFUSED, DIFFERENT, NOT_MADE)}
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return f"{len(findings)} architectures of transformers {version('transformers')}: {listed}."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spec-rollout check",
        description=f"{__doc__} Each model has a vocabulary of {VOCAB} and a context of {CONTEXT} tokens, in float32.",
    )
    parser.add_argument("--architectures", action="store_true", required=True, help="this table")
    parser.add_argument("--only", metavar="NAME,NAME", help="model types, as config.json gives them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the table")
    return parser
