"""Drafts that do not learn, chosen beside the head by what they are predicted to take."""

import pytest
import torch

from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.config import SpecConfig
from spec_rollout.draft.self_drafter import SelfDrafter
from spec_rollout.engine.engine import RolloutEngine
from tests.backends.learned import PARAMS, plain
from tests.tiny import PROMPTS, assert_same, make_policy, policy

DRAFTS = ("quantized", "model")


def backend_for(kind, tmp_path, gamma=3, model=None, **options):
    if kind == "model":
        policy("llama").save_pretrained(tmp_path / "model")
        options["draft_model_path"] = str(tmp_path / "model")
    given = {"draft_quantized": kind == "quantized", "draft_ngrams": False} | options
    config = SpecConfig(num_speculative_tokens=gamma, calibration_cache=str(tmp_path / "costs"), **given)
    return EmbeddedBackend(model or policy("llama"), config)


@pytest.mark.filterwarnings("error:The drafter broke")
@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("kind", DRAFTS)
def test_the_first_rollout_guesses_and_changes_no_token(kind, refresh, tmp_path):
    backend = backend_for(kind, tmp_path, draft_refresh=refresh, max_slots=5)
    assert_same(backend.generate(PROMPTS * 4, PARAMS), plain("llama"))
    stats = backend.take_stats()
    assert stats.mean_acceptance_length > 2 and stats.model_drafted == stats.drafted > 0
    assert bool(backend.learner.buffer.samples) == refresh  # the head's features are gathered meanwhile


@pytest.mark.parametrize("kind", DRAFTS)
def test_adaptive_measures_what_it_costs(kind, tmp_path):
    backend = backend_for(kind, tmp_path, gamma=None)
    assert_same(backend.generate(PROMPTS * 4, PARAMS), plain("llama"))
    assert len(list((tmp_path / "costs").glob("cost-*.json"))) == 2  # of the policy's passes, and of guesses
    assert backend.engine.drafter is backend.model.drafter and backend.engine.controller is backend.model.controller


def test_the_copy_is_made_anew_after_each_update_and_no_more_often(tmp_path):
    model = make_policy("llama")
    backend = backend_for("quantized", tmp_path, model=model, draft_refresh=False)
    backend.generate(PROMPTS, PARAMS)
    first = backend.model.drafter
    assert isinstance(first, SelfDrafter) and not first.stale and first.renew_s > 0
    backend.generate(PROMPTS, PARAMS)
    backend.refresh()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(-1.3)
    backend.take_stats()
    assert first.stale
    found = backend.generate(PROMPTS, PARAMS, seed=(1,))
    assert_same(found, RolloutEngine(model).generate(PROMPTS, PARAMS, seed=(1,)))
    assert backend.stats.mean_acceptance_length > 2 and not first.stale


@pytest.mark.parametrize("rate", [0.2, 0.99])
def test_a_head_that_has_learned_takes_over_where_it_is_predicted_to_be_faster(rate, tmp_path):
    backend = backend_for("quantized", tmp_path, draft_overhead=1e9)
    backend.generate(PROMPTS, PARAMS)
    backend.refresh(0.5)
    backend.learner.proven = [rate] * 3
    backend.generate(PROMPTS, PARAMS)
    assert (backend.engine.drafter is backend.drafter) == (rate > 0.9)


def test_where_plain_decoding_is_predicted_to_be_as_fast_nothing_is_copied(tmp_path):
    backend = backend_for("quantized", tmp_path, gamma=None, draft_refresh=False)
    backend.generate(PROMPTS, PARAMS)
    backend.refresh()
    backend.model.drafter.renew_s = 1e9
    backend.generate(PROMPTS, PARAMS)
    assert backend.engine.drafter is backend.drafter and backend.model.drafter.stale
