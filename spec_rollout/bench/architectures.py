"""`spec-rollout check --architectures`: every causal language model that transformers can make tiny, decoded with and
without speculation: the same tokens, or a clear refusal. In any dtype, with any attention that runs here."""

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

from spec_rollout.bench.comparison import identical_share, shown
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
LOGPROB_ERRORS = 1e-3, 0.3
"""Most by which log-probs may be off in float32 and float64, and in fewer digits."""
EXACT = ("float32", "float64")
"""Where another token is a fault. In fewer digits a near-tie may decide otherwise."""
COUNTS = IDENTICAL, REFUSED, DIFFERENT, NOT_MADE = "identical", "refused", "DIFFERENT", "not made"
DTYPES = (*EXACT, "bfloat16", "float16")
OWN = "own"
"""The attention implementation that transformers chooses by itself."""


@dataclass
class Finding:
    """What became of one architecture; `reason` says why it is not identical, `identical_share` how much of it is."""

    architecture: str
    model: str
    outcome: str
    reason: str = ""
    identical_share: float | None = None


class Changing:
    """Another γ in every step."""

    def __init__(self):
        self.gammas = itertools.cycle(GAMMAS)

    def choose(self, batch_size: int, context: int) -> int:
        return next(self.gammas)

    def observe(self, stats: StepStats) -> None:
        pass


def examine(name: str, dtype: torch.dtype = torch.float32, **options) -> Finding:
    """Make a tiny model of type `name` whose configuration has `options`, and decode it in `dtype`."""
    try:
        model = make_tiny(name, **options).to(dtype)
        with torch.no_grad():
            model(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False)
    except Exception as error:  # whatever a configuration of these sizes runs into
        return Finding(name, "", NOT_MADE, _first_line(error))
    kind = type(model).__name__
    try:
        share, reason = _compare(model)
    except ValueError as error:
        return Finding(name, kind, REFUSED, _first_line(error))
    except FloatingPointError as error:  # random weights that overflow
        return Finding(name, kind, NOT_MADE, _first_line(error))
    return Finding(name, kind, DIFFERENT if reason else IDENTICAL, reason, share)


def _compare(model: PreTrainedModel) -> tuple[float, str]:
    """The share of tokens that speculation leaves as they are, and how it changes what is decoded: empty if not."""
    plain = RolloutEngine(model, SpecConfig(num_speculative_tokens=0)).generate(PROMPTS, PARAMS)
    shares = {}
    for drafter, slots in ((OracleDrafter(plain), 64), (RandomDrafter(), 2)):
        engine = RolloutEngine(model, SpecConfig(max_slots=slots), drafter=drafter, controller=Changing())
        shares[type(drafter).__name__] = identical_share(engine.generate(PROMPTS, PARAMS), plain)
    worst = min(shares, key=lambda name: shares[name])
    if shares[worst] < 1:
        return shares[worst], f"other tokens with {worst}: {shown(shares[worst])} the same"
    error = max(_error(model, prompt, c) for prompt, c in zip(PROMPTS, plain, strict=True))
    bound = LOGPROB_ERRORS[model.dtype not in (torch.float32, torch.float64)]
    return 1.0, f"log-probs off by {error:.1e}" if error > bound else ""


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
    tables = {way: examine_all(names, *way) for way in itertools.product(args.dtypes, args.attentions)}
    for way, findings in tables.items():
        rows = [list(asdict(f).values())[:4] for f in findings]
        table(("architecture", "model", "outcome", f"reason ({', '.join(way)})"), rows)
    print(f"transformers {version('transformers')}")
    table(("dtype", "attention", *COUNTS, "least share"), [[*way, *counts(f)] for way, f in tables.items()])
    found = [asdict(f) | dict(zip(("dtype", "attention"), way, strict=True)) for way in tables for f in tables[way]]
    write_json(args.json, {"transformers": version("transformers"), "findings": found})
    return int(any(f["outcome"] == DIFFERENT and f["dtype"] in EXACT for f in found))


def examine_all(names: list[str], dtype: str = "float32", attention: str = OWN) -> list[Finding]:
    """In `dtype`, with the attention implementation `attention`."""
    options = {} if attention == OWN else {"_attn_implementation": attention}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bar = tqdm(names, desc=f"architectures, {dtype}, {attention}", unit="model")
        return [examine(name, getattr(torch, dtype), **options) for name in bar]


def counts(findings: list[Finding]) -> list:
    """How many came to each of COUNTS, and the least share of identical tokens among those that were decoded."""
    shares = [f.identical_share for f in findings if f.identical_share is not None]
    return [*(sum(f.outcome == kind for f in findings) for kind in COUNTS), shown(min(shares)) if shares else ""]


def summary(findings: list[Finding]) -> str:
    listed = ", ".join(f"{count} {kind}" for count, kind in zip(counts(findings), COUNTS, strict=False))
    return f"{len(findings)} architectures of transformers {version('transformers')}: {listed}."


def _dtypes(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(DTYPES):
        raise argparse.ArgumentTypeError(f"{text}: each must be one of {', '.join(DTYPES)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spec-rollout check",
        description=f"{__doc__} Each model has a vocabulary of {VOCAB} and a context of {CONTEXT} tokens.",
    )
    parser.add_argument("--architectures", action="store_true", required=True, help="this table")
    parser.add_argument("--only", metavar="NAME,NAME", help="model types, as config.json gives them")
    parser.add_argument("--dtypes", type=_dtypes, default=["float32"], metavar="float32,bfloat16,float16")
    parser.add_argument(
        "--attentions",
        type=lambda text: text.split(","),
        default=[OWN],
        metavar="eager,sdpa,flex_attention",
        help="attention implementations as transformers names them; 'own': what it chooses by itself",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the table")
    return parser
