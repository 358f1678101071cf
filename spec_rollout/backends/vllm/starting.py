"""What vLLM is started with to guess: an EAGLE-3 head in a folder, or the MTP head in the policy's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from spec_rollout.backends.vllm.draft import save_start, start_vocabulary
from spec_rollout.backends.vllm.engine import VLLMEngine, own_speculative_config, speculative_config
from spec_rollout.config import SpecConfig
from spec_rollout.draft.learner import DraftLearner
from spec_rollout.draft.mtp import MtpHead

StartEngine = Callable[[dict[str, Any] | None], VLLMEngine]
"""Starts vLLM with that speculative_config; None: no draft."""


def started(start: StartEngine, learner: DraftLearner | None, config: SpecConfig, steady: int | None) -> VLLMEngine:
    """vLLM with what `learner` trains; the shapes count, the weights are pushed before the first rollout."""
    if learner is None:
        return start(None)
    view, head = learner.view, learner.head
    if isinstance(head, MtpHead):
        return start(own_speculative_config(steady or config.widest, config.max_slots, steady is not None))
    ids = start_vocabulary(view.config.vocab_size, view.draft_ids, head)
    view.draft_ids = None if ids is None else ids.to(learner.device)
    with TemporaryDirectory(prefix="spec-rollout-") as folder:
        save_start(Path(folder, "draft"), head, view.draft_ids)
        return start(speculative_config(Path(folder, "draft"), config.widest, config.max_slots))
