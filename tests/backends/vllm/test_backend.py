"""vLLM as the engine: its own code, tiny policies, in this process."""

import copy
from itertools import accumulate

import pytest
import torch

from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.backends.vllm.draft import draft_tensors
from spec_rollout.backends.vllm.worker import LiveWeights
from spec_rollout.config import SpecConfig
from spec_rollout.draft.checkpoint import save_head
from spec_rollout.draft.eagle import EagleHead
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import SamplingParams
from tests.backends.vllm.tiny import GREEDY, PROMPTS, make_backend, needs_vllm, runner, save_policy, teach
from tests.tiny import assert_same

pytestmark = [needs_vllm, pytest.mark.usefixtures("patient_watchman")]


def plain(model, params=GREEDY, prompts=PROMPTS):
    return RolloutEngine(model).generate(prompts, params)


@pytest.fixture(scope="module")
def once_taught(tmp_path_factory):
    """A backend at 3 guesses whose head has learned the greedy completions; its policy ties its embeddings."""
    backend = make_backend(
        save_policy(tmp_path_factory.mktemp("policy"), tie_word_embeddings=True), num_speculative_tokens=3
    )
    teach(backend)
    return backend


@pytest.fixture
def taught(once_taught):
    """The same; what a test does to the weights is undone."""
    parts = (once_taught.model, once_taught.learner.head)
    before = [copy.deepcopy(part.state_dict()) for part in parts]
    once_taught.take_stats()
    yield once_taught
    for part, state in zip(parts, before, strict=True):
        part.load_state_dict(state)
    once_taught.delivery.pushed = None


def test_greedy_completions_are_those_without_speculation(taught):
    assert_same(taught.generate(PROMPTS, GREEDY), plain(taught.model))
    stats = taught.take_stats()
    assert stats.mean_acceptance_length > 2 and taught.draft_healthy
    assert stats.emitted == len(PROMPTS) * GREEDY.max_new_tokens
    assert all(len(step.accepted) == step.gamma for step in stats.steps)


def test_penalties_stops_and_limits_are_honoured(taught):
    params = SamplingParams(max_new_tokens=24, temperature=0, repetition_penalty=1.3)
    eos = plain(taught.model, params)[0].token_ids[9]
    params = SamplingParams(max_new_tokens=24, temperature=0, repetition_penalty=1.3, eos_token_ids=(eos,))
    limits = [5 + i for i in range(len(PROMPTS))]
    expected = RolloutEngine(taught.model).generate(PROMPTS, params, max_new_tokens=limits)
    assert {c.finish_reason for c in expected} == {"eos", "length"}
    assert_same(taught.generate(PROMPTS, params, max_new_tokens=limits), expected)
    assert taught.take_stats().drafted > 0


def test_a_seed_names_the_draws(taught):
    params = SamplingParams(max_new_tokens=16)
    drawn = [[c.token_ids for c in taught.generate(PROMPTS, params, seed=(s,))] for s in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]


def test_the_exported_head_guesses_as_ours_does(taught, tmp_path, monkeypatch):
    taught.save(tmp_path / "draft")
    config = SpecConfig(num_speculative_tokens=3, draft_model_path=str(tmp_path / "draft"), draft_refresh=False)
    ours, theirs = EmbeddedBackend(taught.model, config), runner(taught).drafter
    guesses = {}
    for name, drafter in (("ours", ours.drafter), ("theirs", theirs)):

        def kept(*given, propose=drafter.propose, name=name, **options):
            guesses.setdefault(name, []).append(propose(*given, **options))
            return guesses[name][-1]

        monkeypatch.setattr(drafter, "propose", kept)
    found = {}
    for name, backend in (("ours", ours), ("theirs", taught)):
        backend.take_stats()
        backend.generate([[9, 50, 2]], SamplingParams(max_new_tokens=96, temperature=0))  # not known by heart
        emitted = list(accumulate(step.emitted for step in backend.take_stats().steps))
        # ours guesses at the beginning of a step, vLLM at its end
        known = [0, *emitted] if name == "ours" else emitted
        found[name] = {at: g[0].tolist() for at, g in zip(known, guesses[name], strict=False)}
    shared = sorted(found["ours"].keys() & found["theirs"].keys())[:-2]  # near the end vLLM guesses less
    assert len(shared) > 5
    assert [found["ours"][at] for at in shared] == [found["theirs"][at] for at in shared]


PARTS = ["embed_tokens", "q_proj", "down_proj", "input_layernorm", "norm"]


@pytest.mark.parametrize("part", PARTS)
def test_a_step_as_small_as_one_of_learning_arrives(taught, part):
    step = 1e-3  # of the weights' size; the rounding of bfloat16 is four times that
    noise = torch.Generator().manual_seed(0)
    before = largest_difference(taught)
    with torch.no_grad():
        for name, weight in taught.model.named_parameters():
            if name.split(".")[-2] == part:
                weight.add_(step * weight.abs().mean() * torch.randn(weight.shape, generator=noise).sign())
    moved = largest_difference(taught)
    taught.policy_version += 1
    assert before < 2e-5 and moved > 5e-4 and largest_difference(taught) < 2e-5


def largest_difference(backend) -> float:
    """Between log-probs of what vLLM draws and the policy's own."""
    worst = 0.0
    for prompt, drawn in zip(PROMPTS, backend.generate(PROMPTS, SamplingParams(max_new_tokens=8)), strict=True):
        ids = torch.tensor([prompt + drawn.token_ids])
        with torch.no_grad():
            scores = backend.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own = scores.gather(1, torch.tensor(drawn.token_ids)[:, None])[:, 0]
        worst = max(worst, float((own - torch.tensor(drawn.logprobs)).abs().max()))
    return worst


@pytest.mark.parametrize("part", PARTS)
def test_every_kind_of_weight_of_a_moved_policy_arrives(taught, part):
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in taught.model.named_parameters():
            if name.split(".")[-2] == part:
                weight.add_(0.05 * torch.randn(weight.shape, generator=noise))
    taught.policy_version += 1
    assert_same(taught.generate(PROMPTS, GREEDY), plain(taught.model))


def test_a_draft_lost_on_the_way_is_noticed_at_once(taught, monkeypatch):
    taught.deliver()
    with torch.no_grad():
        taught.learner.head.midlayer.mlp.down_proj.weight.mul_(1.05)
    taught.policy_version += 1
    taught.take_stats()
    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="down_proj responds with"):
        patch.setattr(LiveWeights, "_load_draft", lambda self, tensors: None)
        completions = taught.generate(PROMPTS, GREEDY)
    assert not taught.draft_healthy and taught.take_stats().drafted == 0
    assert_same(completions, plain(taught.model))
    taught.generate(PROMPTS, GREEDY)
    assert not taught.draft_healthy and taught.take_stats().drafted == 0  # nothing has changed: no push
    taught.policy_version += 1
    taught.generate(PROMPTS, GREEDY)
    assert taught.draft_healthy and taught.take_stats().drafted > 0


def test_a_push_without_the_draft_is_noticed_at_once(taught, monkeypatch):
    load = taught.engine.load
    monkeypatch.setattr(taught.engine, "load", lambda draft, version: load(None, version))
    taught.policy_version += 1
    with pytest.warns(RuntimeWarning, match="holds version"):
        taught.generate(PROMPTS, GREEDY)
    assert not taught.draft_healthy


def test_a_policy_that_does_not_arrive_is_an_error(taught, monkeypatch):
    monkeypatch.setattr(taught.engine, "load", lambda draft, version: None)
    taught.policy_version += 1
    with pytest.raises(RuntimeError, match="version"):
        taught.generate(PROMPTS, GREEDY)


def test_after_sleep_both_are_pushed_again(taught, monkeypatch):
    taught.generate(PROMPTS, GREEDY)
    version = taught.delivery.version
    taught.generate(PROMPTS, GREEDY)
    assert taught.delivery.version == version
    monkeypatch.setattr(taught.engine, "sleeps", True)
    taught.generate(PROMPTS, GREEDY)
    taught.take_stats()
    assert_same(taught.generate(PROMPTS, GREEDY), plain(taught.model))
    assert taught.delivery.version == version + 1 and taught.take_stats().drafted > 0


def test_an_update_cannot_overwrite_the_policys_output_head(taught):
    """What the shared head is for vLLM, and that neither we nor a caller of `live_load` can fall into the trap."""
    draft = runner(taught).get_draft_model()
    assert draft.lm_head is runner(taught).get_model().lm_head
    tensors = draft_tensors(taught.learner)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = torch.zeros_like(taught.learner.view.output_rows())
    with pytest.raises(RuntimeError, match="overwrite the policy's"):
        taught.engine.load(tensors.items(), 99)
    taught.delivery.pushed = None
    assert_same(taught.generate(PROMPTS, GREEDY), plain(taught.model))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """An untied policy, and a head from elsewhere whose own output head is a copy of the policy's."""
    model = save_policy(tmp_path_factory.mktemp("policy"), "llama", tie_word_embeddings=False)
    folder = tmp_path_factory.mktemp("head") / "head"
    shape = make_backend(model).learner.head.config
    head = EagleHead(shape, own_output=shape.vocab_size)
    head.load_state_dict({**head.state_dict(), "lm_head.weight": model.lm_head.weight.detach()})
    save_head(folder, head, None, None, {})
    return make_backend(model, num_speculative_tokens=2, draft_model_path=str(folder))


def test_a_head_with_an_output_head_like_the_policys_keeps_it_to_itself(foreign):
    before = foreign.generate(PROMPTS, GREEDY)
    assert runner(foreign).get_draft_model().lm_head is not runner(foreign).get_model().lm_head
    with torch.no_grad():
        foreign.learner.head.lm_head.weight.zero_()
    foreign.policy_version += 1
    assert_same(foreign.generate(PROMPTS, GREEDY), before)
    assert_same(before, plain(foreign.model))
    assert foreign.draft_healthy
