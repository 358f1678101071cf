"""Rows packed one behind the other: what the policy reads and what the draft learns are those of rows on their own."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft.features import FeatureBuffer
from spec_rollout.draft.tap import FeatureTap
from tests.draft.test_tap import padded
from tests.tiny import make_policy

pytest.importorskip("trl.experimental.async_grpo")

from trl.experimental.async_grpo.async_grpo_trainer import DataCollatorForRollout
from trl.experimental.async_grpo.packing import TreeRow

from spec_rollout.training.async_grpo.tree import allowed, rows_of, use_dense_attention

PROMPTS = [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 9], [5, 6]]
DRAWN = [[7, 8, 9, 10], [7, 8, 11], [7, 8], [3, 3, 3, 3, 3], [1, 2, 3, 4, 7]]
"""Some share their prompt, two more tokens beside it; one is the beginning of another."""


def packed(prompts=PROMPTS, drawn=DRAWN) -> dict[str, torch.Tensor]:
    """The batch that TRL's collator makes of it."""
    row = TreeRow()
    for number, (prompt, tokens) in enumerate(zip(prompts, drawn, strict=True)):
        mask = np.array([0] * len(prompt) + [1] * len(tokens))
        row.add(
            {
                "input_ids": np.array(prompt + tokens),
                "completion_mask": mask,
                "old_log_probs": np.zeros(len(mask), dtype=np.float32),
                "advantage": 1.0,
                "group_id": number,
                "metrics": {},
            }
        )
    return DataCollatorForRollout(pad_token_id=0)([[row]])


def read(model, batch):
    """The hidden states of the model's pass over the row."""
    tree = {name: batch[name][0] for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], **tree).logits[0]


def test_rows_are_found_in_a_packed_one():
    batch = packed()
    found = {tuple(batch["input_ids"][0][places].tolist()): prompt for places, prompt in rows_of(batch)}
    assert found == {tuple(p + d): len(p) for p, d in zip(PROMPTS, DRAWN, strict=True)}
    assert batch["input_ids"].shape[1] < sum(map(len, PROMPTS + DRAWN))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_packed_row_is_read_as_its_rows_on_their_own(name):
    model, batch = make_policy(name), packed()
    with torch.no_grad():
        alone = [model(torch.tensor([p + d])).logits[0] for p, d in zip(PROMPTS, DRAWN, strict=True)]
        use_dense_attention(model)
        together = read(model, batch)
    rows = {tuple(batch["input_ids"][0][places].tolist()): together[places] for places, _ in rows_of(batch)}
    for prompt, drawn, logits in zip(PROMPTS, DRAWN, alone, strict=True):
        torch.testing.assert_close(rows[tuple(prompt + drawn)], logits, atol=1e-4, rtol=1e-4)


def features(model, batch, shift=0):
    """By a row's tokens, what the draft learns from a packed pass; with the border behind the first row moved."""
    tap, buffer = FeatureTap(model, (0, 1)), FeatureBuffer(10_000)
    moved = {name: numbers.clone() for name, numbers in batch.items()}
    moved["tree_cu_seqlens_k"][0, 1] += shift
    with torch.no_grad(), tap.listen_packed(buffer, batch["input_ids"][0], rows_of(moved)):
        read(model, batch)
    return {tuple(sample.tokens.tolist()): sample for sample in buffer.samples}


@pytest.mark.parametrize("shift", [0, 1, -1])
def test_the_draft_learns_from_it_what_it_would_from_its_rows(shift):
    prompts, drawn = ([[4, 2], [1, 2, 3], [5, 6]], [[7, 8, 9], [7, 8], [1, 2, 3, 4]]) if shift else (PROMPTS, DRAWN)
    model, (ids, mask) = make_policy("llama"), padded(prompts, drawn)
    buffer = FeatureBuffer(10_000)
    with torch.no_grad(), FeatureTap(model, (0, 1)).listen(buffer, ids, mask, [len(p) for p in prompts]):
        model(input_ids=ids, attention_mask=mask)
    alone = {tuple(sample.tokens.tolist()): sample for sample in buffer.samples}
    use_dense_attention(model)
    together = features(model, packed(prompts, drawn), shift)
    if shift:
        assert together.keys() != alone.keys()
        return
    assert together.keys() == alone.keys() and len(together) == len(prompts)
    for tokens, found in together.items():
        torch.testing.assert_close(found.features, alone[tokens].features, atol=1e-4, rtol=1e-4)
        assert found.prompt == alone[tokens].prompt


def test_a_window_counts_the_tokens_of_a_row_not_those_between():
    batch = packed()
    borders = (batch[name][0].long() for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k"))
    seen = allowed(*borders, window=2)
    assert seen.sum(1).max() == 2
    for places, _ in rows_of(batch):
        for before, here in pairwise(places):
            assert seen[here].nonzero().flatten().tolist() == sorted([int(before), int(here)])


def test_options_are_flat(tmp_path):
    from spec_rollout.training import SpecAsyncGRPOConfig
    from spec_rollout.training.config import spec_config

    args = SpecAsyncGRPOConfig(str(tmp_path), bf16=False, use_cpu=True, max_slots=7, draft_overhead=0.2)
    assert spec_config(args) == SpecConfig(rollout_backend="vllm", max_slots=7, draft_overhead=0.2)
