"""The head learns what the policy says, and nothing else moves."""

from itertools import islice, pairwise

import pytest
import torch
import torch.nn.functional as F

from spec_rollout.draft import refresh
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.features import HELD_OUT_TOKENS, FeatureBuffer, Sample, hold_out
from spec_rollout.draft.objective import scores
from spec_rollout.draft.packing import pack
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.refresh import (
    DEEPER_AFTER,
    FIRST_UNROLLED_STEPS,
    MAX_EPOCHS,
    PACK_WIDTH,
    UNROLLED_STEPS,
    DraftTrainer,
)
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


def test_training_lowers_the_loss_and_leaves_policy_and_random_stream_alone(buffer, monkeypatch):
    model = policy("llama")
    before, weights = torch.get_rng_state(), {n: p.clone() for n, p in model.named_parameters()}
    trainer = trainer_for(model)
    monkeypatch.setattr(refresh, "MAX_EPOCHS", 20)
    losses = [trainer.step(batch).item() for batch in islice(trainer.batches(buffer.samples), 15)]
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in model.named_parameters())


def test_acceptance_on_unseen_rollouts_is_measured_before_and_after(buffer):
    trainer = trainer_for(policy("llama"))
    stats = trainer.train(buffer, seconds=60.0)
    assert len(stats.acceptance_before) == len(stats.acceptance) == UNROLLED_STEPS
    assert all(0 < before < after < 1 for before, after in zip(stats.acceptance_before, stats.acceptance, strict=True))
    assert stats.steps == MAX_EPOCHS and stats.tokens > 0


def test_acceptance_is_the_overlap_of_draft_and_target(buffer):
    """On one rollout, from full distributions computed here."""
    trainer = trainer_for(policy("llama"))
    (sample, *_) = buffer.samples
    head, view = trainer.head, trainer.view
    with torch.no_grad():
        (log_q, target), *_ = scores(head, view, pack([sample], PACK_WIDTH), 1)
        fused = sample.features[:, : head.fc.in_features].float()
        embeds = view.embed(sample.tokens[1:])[None]
        hidden = head.fuse(fused)[None]
        q, k, v = head.project(embeds, hidden, torch.arange(len(fused))[None])
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        logits = view.logits(head.norm(head.combine(attended, hidden))[0], view.output_rows())
        truth = view.logits(sample.features[:, head.fc.in_features :], view.output_rows()).softmax(-1)
    places = torch.arange(len(fused))
    learn = (places + 2 >= sample.prompt) & (places + 1 < len(fused))
    wanted = torch.minimum(logits.softmax(-1)[learn], truth[places[learn] + 1]).sum(-1)
    torch.testing.assert_close(torch.minimum(log_q.exp(), target).sum(-1), wanted)
    if trainer.precision.fast_dtype is torch.bfloat16:  # `acceptance` itself may round
        assert trainer.acceptance([sample])[0] == pytest.approx(wanted.mean().item(), abs=0.02)


def test_an_older_head_is_unrolled_further(buffer, monkeypatch):
    trainer = trainer_for(policy("llama"))
    batch = next(trainer.batches(buffer.samples))
    depths = []

    def counted(head, view, batch, steps, starts):
        depths.append(steps)
        return scores(head, view, batch, steps, starts)

    monkeypatch.setattr(refresh, "scores", counted)
    for steps in (0, DEEPER_AFTER - 1, DEEPER_AFTER):
        trainer.steps = steps
        trainer.step(batch)
    assert depths == [FIRST_UNROLLED_STEPS, FIRST_UNROLLED_STEPS, UNROLLED_STEPS]


def test_training_ends_after_a_burst_that_does_not_pay(buffer, monkeypatch):
    monkeypatch.setattr(refresh, "BURST", 4)
    monkeypatch.setattr(refresh, "FIRST_BURST", 2)
    monkeypatch.setattr(refresh, "MAX_EPOCHS", 20)
    seen = []

    def worth(before, after):
        seen.append((before, after))
        return 1e9 if len(seen) < 3 else 0.0

    stats = trainer_for(policy("llama")).train(buffer, 60.0, worth)
    assert stats.steps == 2 + 2 * 4 and len(seen) == 3
    assert all(one[1] == two[0] for one, two in pairwise(seen))  # each burst is judged from where the last one ended
    assert stats.acceptance_before == seen[0][0] and stats.acceptance == seen[-1][1]


def test_the_newest_rollouts_come_first(buffer):
    buffer.advance()
    for token in range(4):
        buffer.add(torch.full((31,), token), buffer.samples[0].features, 4)
    trainer = trainer_for(policy("llama"))
    first = next(trainer.batches(buffer.samples))
    assert {int(t) for t in first.tokens[first.document >= 0]} == {0, 1, 2, 3}


def group(prompt, count, version, size=100):
    tokens = torch.full((size + 1,), prompt)
    return [Sample(tokens, torch.zeros(size, 1), 4, version) for _ in range(count)]


def prompts_of(samples):
    return {int(sample.tokens[0]) for sample in samples}


def test_whole_groups_of_the_newest_policy_are_held_out():
    """Siblings of a held-out rollout would tell the head what it says."""
    samples = [sample for prompt in range(12) for sample in group(prompt, 4, 1)] + group(50, 4, 0)
    held, rest = hold_out(samples, torch.Generator().manual_seed(0))
    assert HELD_OUT_TOKENS <= sum(len(s.features) for s in held) < HELD_OUT_TOKENS + 100
    assert len(prompts_of(held)) == 2 and not prompts_of(held) & prompts_of(rest)
    assert 50 in prompts_of(rest)


def test_of_few_prompts_single_rollouts_are_held_out():
    held, rest = hold_out(group(1, 8, 0), torch.Generator().manual_seed(0))
    assert len(held) == 2 and len(rest) == 6
    assert len(hold_out(group(1, 3, 0), torch.Generator())[1]) == 3
    assert hold_out([], torch.Generator()) == ([], [])


def test_optimiser_state_continues(buffer):
    """As in one training that is not cut in two."""
    whole, half = trainer_for(policy("llama")), trainer_for(policy("llama"))
    for trainer in (whole, half):
        for batch in islice(trainer.batches(buffer.samples), 3):
            trainer.step(batch)
    other = trainer_for(policy("llama"))
    other.head.load_state_dict(half.head.state_dict())
    other.load_state_dict(half.state_dict())
    for trainer in (whole, other):
        for batch in islice(trainer.batches(buffer.samples), 3):
            trainer.step(batch)
    for (name, one), two in zip(whole.head.named_parameters(), other.head.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_the_average_follows_the_weights(buffer):
    trainer = trainer_for(policy("llama"))
    seen = []
    for batch in islice(trainer.batches(buffer.samples), 4):
        trainer.step(batch)
        seen.append(trainer.head.fc.weight.detach().clone())
    low, high = torch.stack(seen).amin(0), torch.stack(seen).amax(0)
    first = trainer_for(policy("llama")).head.fc.weight
    low, high = torch.minimum(low, first), torch.maximum(high, first)
    average = trainer.average.fc.weight
    assert ((average >= low - 1e-7) & (average <= high + 1e-7)).all()
    assert not torch.equal(average, first) and not torch.equal(average, seen[-1])


def test_optimiser_state_of_another_head_is_refused(buffer):
    trainer = trainer_for(policy("llama"))
    trainer.step(next(trainer.batches(buffer.samples)))
    state = trainer.state_dict()
    for key, value in (("0.0.momentum_buffer", torch.zeros(3, 3)), ("0.99.momentum_buffer", torch.zeros(1))):
        with pytest.raises(ValueError, match="not this head's"):
            trainer_for(policy("llama")).load_state_dict(state | {key: value})


def test_training_stops_when_its_time_is_spent(buffer):
    trainer = trainer_for(policy("llama"))
    assert trainer.train(buffer, seconds=0.0).steps == 0
    trainer.step_seconds = 10.0
    assert trainer.train(buffer, seconds=5.0).steps == 0
    assert trainer.train(buffer, seconds=60.0).steps > 0 and trainer.step_seconds < 10
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
    view = PolicyView(policy("llama"))
    view.draft_ids = chosen = choose_vocabulary(samples, view)
    assert chosen.tolist() == [0, 40, 41, 42, 90, 91]
    assert choose_vocabulary(samples, view) is chosen  # still covers what is sampled
    samples.append(Sample(torch.tensor([90, 91, *[50] * 8]), features, 2, 1))
    assert 50 in choose_vocabulary(samples, view).tolist()
    assert choose_vocabulary([], view) is chosen
    monkeypatch.setattr("spec_rollout.draft.vocabulary.DRAFT_VOCABULARY", VOCAB)
    view.draft_ids = None
    assert choose_vocabulary(samples, view) is None
