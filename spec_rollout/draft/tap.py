"""Features from forward passes that are run anyway, such as the trainer's for its log-probs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spec_rollout.draft.features import FeatureBuffer
from spec_rollout.draft.policy_view import decoder_layers, decoder_of


class FeatureTap:
    """Listens to `model` and puts what the draft needs of each pass into a buffer, for samplers that do not show the
    policy's hidden states.

    Args:
        model: a Hugging Face causal language model.
        aux_layers: the residual stream after that many layers is kept, besides the final hidden state; after all of
            them, that state itself.

    Raises:
        ValueError: the model's decoder layers cannot be found.
    """

    def __init__(self, model: nn.Module, aux_layers: Sequence[int]):
        self.model, self.aux_layers = model, tuple(aux_layers)
        self.decoder = decoder_of(model)
        self.layers = decoder_layers(model)
        if self.layers is None:
            raise ValueError(
                f"{type(model).__name__} has no list of its layers, so no draft can learn from its passes: sample in "
                "the trainer's own process, or with draft_refresh=False."
            )

    @contextmanager
    def listen(self, buffer: FeatureBuffer, ids: Tensor, mask: Tensor, prompts: Sequence[int]) -> Iterator[None]:
        """Within it the model reads `ids` [N, T] with `mask` [N, T] (1 on tokens, contiguous in each row), in one pass
        or in several over consecutive rows; `prompts` [N] are the numbers of prompt tokens."""
        passes: list[Tensor] = []
        with self._hooked(passes):
            yield
        row = 0
        for features in passes:  # [n, T, F]
            for own in features:
                present = mask[row].bool()
                buffer.add(ids[row][present].clone(), own[present][:-1].clone(), prompts[row])
                row += 1

    @contextmanager
    def listen_packed(self, buffer: FeatureBuffer, ids: Tensor, rows: Sequence[tuple[Tensor, int]]) -> Iterator[None]:
        """Within it the model reads `ids` [T] in one pass, in which `rows` lie: the places [n] of each one's tokens,
        in order, and the number of its prompt tokens. Rows may share places."""
        passes: list[Tensor] = []
        with self._hooked(passes):
            yield
        (features,) = passes  # [1, T, F]
        for places, prompt in rows:
            buffer.add(ids[places], features[0, places[:-1]], prompt)

    @contextmanager
    def _hooked(self, passes: list[Tensor]) -> Iterator[None]:
        """Within it the features [n, T, F] of each pass are appended to `passes`."""
        inputs: dict[int, Tensor] = {}

        def before_layer(number: int):
            return lambda module, args, kwargs: inputs.__setitem__(number, (args or (kwargs["hidden_states"],))[0])

        def after_decoder(module, args, output):
            last = output[0] if isinstance(output, tuple) else output.last_hidden_state
            inputs[len(self.layers)] = last
            passes.append(torch.cat([x.detach() for x in (*(inputs[k] for k in self.aux_layers), last)], -1))

        handles = [
            self.layers[k].register_forward_pre_hook(before_layer(k), with_kwargs=True)
            for k in self.aux_layers
            if k < len(self.layers)
        ]
        handles.append(self.decoder.register_forward_hook(after_decoder))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
