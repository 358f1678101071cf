"""A draft head that rests while nothing is guessed, and catches up before it guesses again.

vLLM passes its draft over every new token, so that the draft's keys and values are there if it should guess in the
next step. Here, in steps without guesses, what that pass would have read is kept, and read in one pass before the next
guess. A completion that ends meanwhile is never read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spec_rollout.backends.vllm.coupled import RUNNER, guessed_any
from spec_rollout.backends.vllm.pending import Pending

KEPT_BYTES = 2**27
"""Most memory for features that the head has not read."""
LONGEST = 512
"""Most tokens of a row that it has not read."""


class LazyHead:
    """Takes the place of `propose_draft_token_ids` of vLLM's first model runner, for an EAGLE head of one layer, whose
    keys and values at a place depend on nothing but the token and the feature there: they can be made in any order."""

    @staticmethod
    def fits(runner: Any) -> bool:
        """Whether `runner` is the one that this was tested with, and has such a head."""
        drafter = getattr(runner, "drafter", None)
        if type(runner).__module__ != RUNNER or runner.use_async_scheduling:
            return False
        return getattr(drafter, "method", None) == "eagle3" and len(drafter.model.model.layers) == 1

    def __init__(self, runner: Any):
        self.runner, self.drafter = runner, runner.drafter
        self.pending: Pending | None = None
        self.propose = runner.propose_draft_token_ids

    def install(self) -> None:
        self.runner.propose_draft_token_ids = self.guess

    def guess(
        self,
        scheduler_output: Any,
        sampled: Tensor,
        sampling: Any,
        hidden: Tensor,
        sample_hidden: Tensor,
        features: list[Tensor] | None,
        metadata: Any,
        attention: Any,
        slot_mappings: Any,
    ) -> Tensor:
        """vLLM's method: guesses [B, γ] int64."""
        given = scheduler_output, sampled, sampling, hidden, sample_hidden, features, metadata, attention
        batch, rows = self.runner.input_batch, self.runner.input_batch.num_reqs
        if self.pending is not None:
            self.pending.follow(batch.req_ids)
        if scheduler_output.num_spec_tokens_to_schedule or guessed_any(metadata):
            self.catch_up(attention)
            return self.propose(*given, slot_mappings)
        reads = batch.num_computed_tokens_cpu[:rows] < batch.num_prompt_tokens[:rows]
        if attention.max_query_len > 1 or reads.any():
            # A prompt's keys and values serve others with the same beginning.
            return self.propose(*given, slot_mappings)
        self._keep(features, sampled, attention)
        self.drafter.num_speculative_tokens = 0
        return sampled.new_empty(rows, 0, dtype=torch.int64)

    def catch_up(self, attention: Any) -> None:
        """Let the head read what it has not; `attention` is vLLM's record of the batch."""
        if self.pending is None or self.pending.empty:
            return
        for rows in self.pending.portions(self.drafter.max_num_tokens):
            features, following, places, slots, ends = self.pending.take(rows)
            device, last = features.device, torch.from_numpy(ends - 1)
            starts = torch.from_numpy(np.concatenate([[0], ends])).int()
            record = replace(
                attention,
                query_start_loc=starts.to(device),
                query_start_loc_cpu=starts,
                seq_lens=places[last].int() + 1,
                num_reqs=len(rows),
                num_actual_tokens=len(features),
                max_query_len=int(np.diff(ends, prepend=0).max()),
                block_table_tensor=attention.block_table_tensor[torch.from_numpy(rows)],
                slot_mapping=slots,
                seq_lens_cpu_upper_bound=places[last].int() + 1,
                positions=None,
                is_prefilling=None,
            )
            self.drafter.propose(
                num_speculative_tokens=0,
                target_token_ids=following.roll(1),  # it reads, at each place, the token of the next one
                target_positions=places,
                target_hidden_states=features,
                next_token_ids=following[last],
                token_indices_to_sample=last.to(device),
                common_attn_metadata=record,
                sampling_metadata=self.runner.input_batch.sampling_metadata,
            )

    def _keep(self, features: list[Tensor], sampled: Tensor, attention: Any) -> None:
        batch = self.runner.input_batch
        if self.pending is None:
            slots, width = self.runner.max_num_reqs, sum(layer.shape[1] for layer in features)
            depth = min(
                KEPT_BYTES // (slots * width * features[0].itemsize), self.drafter.max_num_tokens // 2, LONGEST
            )
            self.pending = Pending(slots, max(depth, 1), features[0].new_empty(width))
            self.pending.follow(batch.req_ids)
        if self.pending.full:
            self.catch_up(attention)
        rows = batch.num_reqs
        # vLLM uses the memory of the last two again in its next step.
        places, slots = self.runner.positions[:rows].clone(), attention.slot_mapping[:rows].clone()
        self.pending.keep([layer[:rows] for layer in features], sampled[:, 0], places, slots)
