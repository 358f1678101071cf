"""What the draft head borrows from the live policy: its embedding and its output head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PolicyView:
    """Reads the policy's weights where they are, so this half of the draft is never stale.

    `draft_ids` [Vd] int64 are the target ids that the draft may guess, ascending; None is the whole vocabulary.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self.draft_ids: Tensor | None = None

    @property
    def embedding(self) -> Tensor:
        """[V, H]"""
        return self.model.get_input_embeddings().weight.detach()

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embedding)

    def output_rows(self) -> Tensor:
        """Rows [Vd, H] of the policy's output head for the draft vocabulary; a view where that is all of it."""
        weight = self.model.get_output_embeddings().weight.detach()
        return weight if self.draft_ids is None else weight[self.draft_ids]

    def logits(self, final: Tensor, rows: Tensor) -> Tensor:
        """The target's logits [..., Vd] float32 over `rows`, from its final hidden states [..., H].

        Repeats what some models do after the output head: a soft cap (Gemma), a scale (Cohere, Granite, Falcon-H1).
        """
        logits = F.linear(final.to(rows.dtype), rows).float() * (getattr(self.config, "logit_scale", None) or 1.0)
        logits = logits * (getattr(self.config, "lm_head_multiplier", None) or 1.0)
        logits = logits / (getattr(self.config, "logits_scaling", None) or 1.0)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if not cap else torch.tanh(logits / cap) * cap

    def to_target(self, draft_tokens: Tensor) -> Tensor:
        """Target ids of indices into the draft vocabulary."""
        return draft_tokens if self.draft_ids is None else self.draft_ids[draft_tokens]


def decoder_of(model: nn.Module) -> nn.Module:
    """What holds the layers of a Hugging Face causal language model; some models (Llama 4) name themselves."""
    decoder, layers = model.get_decoder(), decoder_layers(model)
    if decoder is not model:
        return decoder
    return next((m for m in model.modules() if any(child is layers for child in m.children())), decoder)


def decoder_layers(model: nn.Module) -> nn.ModuleList | None:
    """The decoder layers of a Hugging Face causal language model, first to last; None where there is no such list."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    stacks = (m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    return next(stacks, None)
