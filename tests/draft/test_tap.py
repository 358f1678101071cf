"""The trainer's own forward passes feed the draft as the sampler does."""

import pytest
import torch
from torch import nn

from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.config import SpecConfig
from spec_rollout.draft.features import FeatureBuffer
from spec_rollout.draft.tap import FeatureTap
from spec_rollout.records import SamplingParams
from tests.tiny import PROMPTS, policy
from tests.tiny_configs import ARCHITECTURES


def padded(prompts, completions, pad=0):
    """As TRL lays them out: prompts padded on the left, completions on the right."""
    left, right = max(map(len, prompts)), max(map(len, completions))
    ids = torch.full((len(prompts), left + right), pad)
    mask = torch.zeros_like(ids)
    for i, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        ids[i, left - len(p) : left + len(c)] = torch.tensor([*p, *c])
        mask[i, left - len(p) : left + len(c)] = 1
    return ids, mask


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in ("gpt2", "opt")])  # absolute positions
@pytest.mark.parametrize("passes", [1, 3])
def test_a_trainers_pass_gives_the_features_of_the_rollout(name, passes):
    model = policy(name)
    backend = EmbeddedBackend(model, SpecConfig(num_speculative_tokens=2))
    drawn = [c.token_ids for c in backend.generate(PROMPTS, SamplingParams(max_new_tokens=9, eos_token_ids=(4, 8)))]
    sampled = backend.learner.buffer.samples
    ids, mask = padded(PROMPTS, drawn)
    buffer = FeatureBuffer(10_000)
    tap = FeatureTap(model, backend.learner.head.config.aux_layers)
    with tap.listen(buffer, ids, mask, [len(p) for p in PROMPTS]), torch.no_grad():
        for rows in torch.arange(len(ids)).chunk(passes):
            model(input_ids=ids[rows], attention_mask=mask[rows], logits_to_keep=ids.shape[1] - 3)
    assert len(buffer.samples) == len(sampled) == len(PROMPTS)
    found = {(*sample.tokens.tolist(), sample.prompt): sample.features for sample in buffer.samples}
    for sample in sampled:
        torch.testing.assert_close(
            found[(*sample.tokens.tolist(), sample.prompt)], sample.features, atol=2e-4, rtol=2e-4
        )


def test_the_model_is_left_as_it_was():
    model = policy("llama")
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    tap = FeatureTap(model, (0, 1))
    with pytest.raises(KeyError), tap.listen(FeatureBuffer(10), torch.ones(1, 4).long(), torch.ones(1, 4), [1]):
        raise KeyError
    assert before == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_a_model_without_a_list_of_layers_is_refused():
    class Odd(nn.Module):
        config = policy("llama").config

        def get_decoder(self):
            return nn.Linear(2, 2)

    with pytest.raises(ValueError, match="draft_refresh=False"):
        FeatureTap(Odd(), (0,))
