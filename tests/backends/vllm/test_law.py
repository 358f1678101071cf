"""vLLM's samples with probabilistic drafts have the policy's law; a lossy setting does not, and is seen."""

import pytest
import torch

from spec_rollout.config import VERIFICATIONS
from spec_rollout.records import SamplingParams
from tests.backends.vllm.tiny import make_backend, needs_vllm, runner, save_policy, teach

pytestmark = [needs_vllm, pytest.mark.usefixtures("patient_watchman")]

PROMPT, DRAWS, LENGTH = [3, 1, 4], 5000, 3
LEAST_EXPECTED = 5.0
FALSE_ALARM = 1e-6


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    backend = make_backend(
        save_policy(tmp_path_factory.mktemp("policy")), num_speculative_tokens=2, verification="rejection"
    )
    teach(backend, rounds=2)
    return backend


@torch.no_grad()
def law(model, temperature: float) -> dict[tuple[int, ...], float]:
    """Probabilities of the likely completions of PROMPT, LENGTH tokens long."""
    known = {(): 1.0}
    for _ in range(LENGTH):
        rows = torch.tensor([[*PROMPT, *tokens] for tokens in known])
        p = (model(rows).logits[:, -1].double() / temperature).softmax(-1)
        known = {
            (*tokens, token): weight * float(q)
            for (tokens, weight), row in zip(known.items(), p, strict=True)
            for token, q in enumerate(row)
            if weight * q * DRAWS >= LEAST_EXPECTED
        }
    return known


def p_value(backend, expected: dict[tuple[int, ...], float], seed: int) -> float:
    """Of the χ² test of DRAWS completions at temperature 1 against `expected`, everything unlikely in one cell."""
    params = SamplingParams(max_new_tokens=LENGTH)
    drawn = [tuple(c.token_ids) for c in backend.generate([PROMPT] * DRAWS, params, seed=(seed,))]
    counts = [drawn.count(tokens) for tokens in expected]
    observed = torch.tensor([*counts, DRAWS - sum(counts)], dtype=torch.float64)
    p = torch.tensor([*expected.values(), 1 - sum(expected.values())], dtype=torch.float64) * DRAWS
    statistic, freedom = ((observed - p).square() / p).sum(), torch.tensor(len(p) - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


@pytest.fixture
def guessing(backend):
    """The backend; guesses were really made, and some of them thrown away."""
    backend.take_stats()
    yield backend
    assert 0.05 < backend.take_stats().acceptance_rate < 0.95


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_the_law_is_the_policys(guessing, verification, monkeypatch):
    guessing.engine._call("live_verify", verification)
    monkeypatch.setattr(guessing.engine, "verification", verification)
    expected = law(guessing.model, 1.0)
    assert len(expected) > 30
    assert p_value(guessing, expected, seed=1) > FALSE_ALARM
    guessing.engine._call("live_verify", "rejection")


def test_another_temperature_is_seen(guessing):
    assert p_value(guessing, law(guessing.model, 1.1), seed=1) < FALSE_ALARM


def test_guesses_that_are_kept_too_often_are_seen(guessing, monkeypatch):
    """A guess is kept with probability p/q: a q that is too small is what lossy settings come to."""
    take = runner(guessing).drafter.take_last_draft_probs
    monkeypatch.setattr(runner(guessing).drafter, "take_last_draft_probs", lambda: take() * 0.3)
    assert p_value(guessing, law(guessing.model, 1.0), seed=1) < FALSE_ALARM
