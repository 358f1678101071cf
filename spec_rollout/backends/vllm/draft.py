"""The draft head on its way to vLLM: at the start as a folder, later as tensors, each time read back."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from torch import Tensor

from spec_rollout.backends.vllm.engine import EngineRestarted, VLLMEngine
from spec_rollout.backends.vllm.mtp_readback import probe_mtp
from spec_rollout.backends.vllm.readback import probe
from spec_rollout.draft.checkpoint import save_head
from spec_rollout.draft.eagle import EagleHead
from spec_rollout.draft.learner import DraftLearner
from spec_rollout.draft.mtp import MtpHead
from spec_rollout.draft.vocabulary import DRAFT_VOCABULARY

PROBE_ERROR = 0.004
"""Relative error that rounding may cause: the unit of bfloat16."""
EXPERTS_ERROR = 0.02
"""The same of experts; vLLM's kernel on a CPU answers in bfloat16 with 0.7 % too little."""


def start_vocabulary(vocab_size: int, draft_ids: Tensor | None, head: EagleHead) -> Tensor | None:
    """Target ids that the head may guess until rollouts tell better ones; their number stays."""
    if head.own_output is not None or draft_ids is not None or vocab_size <= DRAFT_VOCABULARY:
        return draft_ids
    return torch.arange(DRAFT_VOCABULARY)


def save_start(folder: str | Path, head: EagleHead, draft_ids: Tensor | None) -> None:
    """Write the head that vLLM is started with: the shapes count, its weights are replaced before the first rollout.

    vLLM lets the draft share the policy's output head where the file has none or an equal one, and an update of a
    shared one overwrites the policy's. So it is left out where the policy's whole output head serves, and otherwise
    written with values that are not the policy's.
    """
    head, rows = copy.deepcopy(head), None
    if head.own_output is not None:
        head.lm_head.weight.data.zero_()
    elif draft_ids is not None:
        rows = torch.zeros(len(draft_ids), head.config.hidden_size)
    save_head(folder, head, rows, draft_ids, {})


def draft_tensors(learner: DraftLearner) -> dict[str, Tensor]:
    """The head's weights by their names in a checkpoint, with what vLLM does not share with the policy."""
    if isinstance(learner.head, MtpHead):
        return learner.head.apart()
    tensors = {name: tensor.detach() for name, tensor in learner.head.folded().items()}
    ids = learner.view.draft_ids
    if ids is not None:
        tensors["d2t"] = ids - torch.arange(len(ids), device=ids.device)
        tensors.setdefault("lm_head.weight", learner.view.output_rows())
    return tensors


def mismatch(engine: VLLMEngine, tensors: dict[str, Tensor] | None, version: int) -> str | None:
    """What is wrong with the weights in vLLM after `tensors` were pushed under `version`; None if nothing is.

    Raises:
        EngineRestarted: vLLM holds what it was started with, so it was restarted after the push.
        RuntimeError: vLLM does not hold the policy that was pushed, so its samples would be another policy's.
    """
    policy, draft = engine.versions()
    if policy == 0:
        raise EngineRestarted(f"vLLM holds the policy that it starts with after version {version} was pushed.")
    if policy != version:
        raise RuntimeError(
            f"vLLM holds version {policy} of the policy after version {version} was pushed: its samples would not be "
            "this policy's."
        )
    if tensors is None:
        return None
    if draft != version:
        return f"vLLM holds version {draft} of it after version {version} was pushed"
    shards = engine.draft_probe()
    for number, found in enumerate(shards):
        where = f" of worker {number}" * (len(shards) > 1)
        expected = probe(tensors, found) if "fc.weight" in tensors else probe_mtp(tensors)
        for name, value in expected.items():
            answer = found.get(name, math.nan)
            if not math.isclose(answer, value, rel_tol=EXPERTS_ERROR if name.endswith("experts") else PROBE_ERROR):
                return f"what was pushed did not arrive: {name}{where} responds with {answer:.4g}, not {value:.4g}"
    return None
