"""The head learns what the policy says, and nothing else moves."""

import pytest
import torch

from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.features import FeatureBuffer, Sample
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.refresh import DraftTrainer
from spec_rollout.draft.vocabulary import choose_vocabulary
from tests.tiny import VOCAB, policy


@pytest.fixture
def buffer():
    """Rollouts of the tiny policy, with the features that it computes for them."""
    model, filled = policy("llama"), FeatureBuffer(10_000)
    layers = HeadConfig.for_target(model.config).aux_layers
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        tokens = torch.randint(VOCAB, (31,), generator=generator)
        with torch.no_grad():
            hidden = model(tokens[None, :-1], output_hidden_states=True).hidden_states
        filled.add(tokens, torch.cat([*(hidden[i][0] for i in layers), hidden[-1][0]], -1), 4)
    return filled


def trainer_for(model):
    return DraftTrainer(EagleHead(HeadConfig.for_target(model.config)), PolicyView(model))


def test_training_lowers_the_loss_and_leaves_policy_and_random_stream_alone(buffer):
    model = policy("llama")
    before, weights = torch.get_rng_state(), {n: p.clone() for n, p in model.named_parameters()}
    trainer = trainer_for(model)
    losses = [trainer._step(batch).item() for _ in range(15) for batch in trainer._epoch(buffer)]
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in model.named_parameters())


def test_training_stops_when_its_time_is_spent(buffer):
    trainer = trainer_for(policy("llama"))
    assert trainer.train(buffer, seconds=0.0).steps <= 1
    assert trainer.train(buffer, seconds=0.0).steps == 0  # a step's time is known now
    assert trainer.train(FeatureBuffer(10), seconds=9.0).steps == 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere2", "qwen3"])
def test_the_target_distribution_is_that_of_the_policy(name):
    """Recomputed from the final hidden state, soft caps and scales included."""
    model = policy(name)
    view = PolicyView(model)
    with torch.no_grad():
        output = model(torch.arange(1, 12)[None], output_hidden_states=True)
        torch.testing.assert_close(view.logits(output.hidden_states[-1], view.output_rows()), output.logits)


def test_the_draft_vocabulary_is_what_the_task_uses(monkeypatch):
    monkeypatch.setattr("spec_rollout.draft.vocabulary.DRAFT_VOCABULARY", 6)
    features = torch.zeros(9, 1)
    samples = [Sample(torch.tensor([90, 91, *[40] * 5, 41, 42, 42]), features, 2, 0)]
    chosen = choose_vocabulary(samples, 97, None)
    assert chosen.tolist() == [0, 40, 41, 42, 90, 91]
    assert choose_vocabulary(samples, 97, chosen) is chosen  # still covers what is sampled
    samples.append(Sample(torch.tensor([90, 91, *[50] * 8]), features, 2, 1))
    assert 50 in choose_vocabulary(samples, 97, chosen).tolist()
    assert choose_vocabulary(samples, 6, None) is None
