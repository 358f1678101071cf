"""What a trained policy's model card says about its rollouts."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from transformers import Trainer

from spec_rollout.config import SpecConfig
from spec_rollout.draft.draft_model import is_language_model

SECTION = """
## Speculative rollouts

The completions that this model learned from were sampled with [spec-rollout](https://pypi.org/project/spec-rollout)
{version}. Their distribution is that of plain decoding.

- Drafter: {drafter}
- Draft training: {refresh}
- Tokens guessed per step (`num_speculative_tokens`): {gamma}
"""


def append_to_card(trainer: Trainer) -> None:
    """Add the section on the rollouts to the card that TRL has just written."""
    card = Path(trainer.args.output_dir, "README.md")
    with card.open("a", encoding="utf-8") as file:
        backend = trainer.sampler.backend
        version, mtp = getattr(backend, "draft_version", 0), getattr(backend, "guesses_with_mtp", False)
        file.write(section(trainer.sampler.config, version, mtp))


def section(config: SpecConfig, draft_version: int, mtp: bool = False) -> str:
    """The section for a run with `config` whose draft, perhaps the policy's `mtp` head, has been trained
    `draft_version` times."""
    fixed = config.num_speculative_tokens
    kind = "the policy's own MTP head, which" if mtp else "an EAGLE-3 head that"
    drafter = f"{kind} started from `{config.draft_model_path}`"
    whole = bool(config.draft_model_path) and is_language_model(config.draft_model_path)
    if config.draft_model_path is None or whole:
        drafter = f"{kind} started from {'its checkpoint' if mtp else 'random weights'}"
    if whole:
        drafter += f", and the language model in `{config.draft_model_path}`, as it is, where that was faster"
    if config.draft_quantized:
        drafter += ", and the policy itself in 8 bit where it was faster"
    if config.draft_ngrams and config.rollout_backend == "embedded":
        drafter += ", and n-grams of earlier rollouts until it was faster"
    refresh = f"on the rollouts, after each generation phase; {draft_version} versions so far"
    return SECTION.format(
        version=_version(),
        drafter=drafter if fixed != 0 else "none",
        refresh=refresh if config.draft_refresh and fixed != 0 else "none",
        gamma=f"adapted, at most {config.widest}" if fixed is None else fixed,
    )


def _version() -> str:
    try:
        return version("spec-rollout")
    except PackageNotFoundError:
        return "(not installed)"
