"""An inflated policy says what the small one says, and costs more."""

import pytest
import torch

from spec_rollout.tasks.inflation import BOUND, Shape, divergence, inflate
from spec_rollout.tasks.reference_policy import Recipe, make_model, make_tokenizer
from tests.tiny import make_policy

LARGER = Shape(layers=5, hidden_size=256, intermediate_size=320, key_width=128)


@pytest.fixture(scope="module")
def small():
    """A confident random policy: with its own initialisation it would be nearly uniform, and hard to change."""
    torch.manual_seed(0)
    model = make_model(Recipe(2, 128, 2, 96, 0, 0, 0.0), make_tokenizer()).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[1].normal_(0.0, 0.06)  # the padding token's, which nothing has trained
        for parameter in model.parameters():
            parameter.mul_(1.8)
    return model


@pytest.fixture(scope="module")
def texts(small):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(small.config.vocab_size, (4, 40), generator=generator).tolist()


def entropy(model, texts) -> float:
    with torch.no_grad():
        logp = model(torch.tensor(texts), use_cache=False).logits.log_softmax(-1)
    return float(-(logp.exp() * logp).sum(-1).mean())


@pytest.mark.parametrize("vocab_size", [None, 1000])
def test_the_distribution_stays(small, texts, vocab_size):
    model = inflate(small, LARGER, vocab_size)
    assert entropy(small, texts) < 5  # of 6: there is something to change
    mean, largest = divergence(small, model, texts)
    assert mean < BOUND and largest < 10 * BOUND
    assert model.config.vocab_size == (vocab_size or small.config.vocab_size)


def test_control_the_divergence_sees_a_change(small, texts):
    model = inflate(small, LARGER)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(1000)  # an added layer that is not small
    assert divergence(small, model, texts)[0] > 100 * BOUND


def test_every_weight_is_random(small):
    """Zeros, or many equal numbers, could run faster than a real model's."""
    for name, weight in inflate(small, LARGER, 1000).named_parameters():
        assert not (weight == 0).any(), name
        values = weight.flatten()[:20000]
        assert weight.ndim == 1 or values.unique().numel() > 0.9 * len(values), name


def test_the_shape(small):
    config = inflate(small, LARGER).config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == LARGER[:3]
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 64)


@pytest.mark.parametrize(("axis", "named"), [(0, "num_hidden_layers=1"), (1, "hidden_size=64"), (2, "intermediate")])
def test_a_smaller_shape_is_refused(small, axis, named):
    values = list(LARGER)
    values[axis] = (1, 64, 32)[axis]
    with pytest.raises(ValueError, match=named):
        inflate(small, Shape(*values))


def test_another_architecture_is_refused():
    with pytest.raises(ValueError, match="A llama policy cannot be inflated"):
        inflate(make_policy("llama"), LARGER)
