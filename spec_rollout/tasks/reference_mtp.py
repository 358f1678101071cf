"""The MTP head of a reference policy, trained beside it as the makers of Qwen3.5 publish theirs."""

from __future__ import annotations

import sys
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from spec_rollout.draft.features import Sample

PROBLEMS, STEPS = 2_000, 300
"""Worked problems that it sees, and steps of training on them."""
PASS_ROWS = 32
"""Problems of one pass of the policy."""


def train_mtp(model: PreTrainedModel, rows: Dataset, seed: int) -> dict[str, Tensor]:
    """The tensors, named as on disk, of a head for the trained policy `model` that has learned on the worked problems
    of `rows` (`single_rows`): to foresee what the policy would write next, several tokens ahead."""
    from tqdm import tqdm

    from spec_rollout.draft.mtp import MtpHead
    from spec_rollout.draft.policy_view import PolicyView
    from spec_rollout.draft.refresh import DraftTrainer

    head = MtpHead(model).to(model.device)
    model._init_weights(head.fc)
    head.layers.apply(model._init_weights)
    trainer = DraftTrainer(head, PolicyView(model), seed=seed)
    batches = islice(trainer.batches(list(_samples(model, rows.select(range(min(PROBLEMS, len(rows))))))), STEPS)
    for batch in (bar := tqdm(batches, desc="training its MTP head", unit="step", file=sys.stderr)):
        bar.set_postfix(loss=f"{trainer.step(batch).item():.2f}")
    return trainer.average.on_disk(model.dtype)


def _samples(model: PreTrainedModel, rows: Dataset) -> Iterator[Sample]:
    """The problems as rollouts: tokens, and the policy's final hidden states at all but the last of them."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from spec_rollout.draft.features import Sample

    for start in range(0, len(rows), PASS_ROWS):
        chunk = rows[start : start + PASS_ROWS]
        tokens = [torch.tensor(ids) for ids in chunk["input_ids"]]
        with torch.no_grad():
            ids = pad_sequence(tokens, batch_first=True).to(model.device)
            hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.cpu()
        for own, states, labels in zip(tokens, hidden, chunk["labels"], strict=True):
            states = states[: len(own) - 1]
            yield Sample(own, torch.cat([states, states], -1), labels.count(-100), 0)
