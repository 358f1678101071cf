"""Where a completion ends: EOS ids and stop strings, checked at every sampled position at once."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from spec_rollout.engine.rows import Rows
from spec_rollout.records import SamplingParams

NO_TOKEN = 2**31 - 1  # StopStringCriteria takes an id outside the vocabulary for a token that matches nothing


def criteria_of(params: SamplingParams, tokenizer: PreTrainedTokenizerBase | None) -> StopStringCriteria | None:
    """What finds the stop strings of `params`; None without any.

    Raises:
        ValueError: stop strings without a tokenizer to match them by.
    """
    if not params.stop_strings:
        return None
    if tokenizer is None:
        raise ValueError(
            f"stop_strings={params.stop_strings} need a tokenizer to be matched: give the engine its `tokenizer`."
        )
    return StopStringCriteria(tokenizer, list(params.stop_strings))


class Stops:
    """Flags the samples after which a row ends.

    Raises:
        ValueError: stop strings without a tokenizer to match them by.
    """

    def __init__(self, params: SamplingParams, tokenizer: PreTrainedTokenizerBase | None, device: torch.device):
        self.eos = torch.tensor(params.eos_token_ids, dtype=torch.int64, device=device)
        self.strings = criteria_of(params, tokenizer)

    def flags(self, rows: Rows, samples: Tensor) -> Tensor:
        """Whether a row ends at each of `samples` [B, T]: bool [B, T]. `rows.tokens` already holds the samples."""
        ends = torch.isin(samples, self.eos)
        if self.strings is not None:
            ends |= self._string_ends(rows, samples.shape[1])
        return ends

    def _string_ends(self, rows: Rows, width: int) -> Tensor:
        reach = self.strings.maximum_token_len
        last = rows.positions(width) + 1  # [B, T]
        place = last[..., None] - torch.arange(reach - 1, -1, -1, device=rows.device)  # [B, T, reach]
        tokens = rows.tokens[: rows.count].gather(1, place.clamp(min=0).flatten(1)).view(place.shape)
        windows = torch.where(place >= 0, tokens, NO_TOKEN).flatten(0, 1)
        return self.strings(windows, None).view(-1, width)
