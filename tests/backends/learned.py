"""A backend whose head has really learned what a tiny policy says."""

from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.config import SpecConfig
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import SamplingParams
from tests.tiny import PROMPTS, policy

PARAMS = SamplingParams(max_new_tokens=40, temperature=0.3, eos_token_ids=(4,))


def backend_for(name, tmp_path, gamma=3, **options):
    """Time enough for the head, which guesses alone, to learn the few sequences that a tiny policy draws at low
    temperature."""
    options = {"draft_overhead": 1e9, "draft_ngrams": False} | options
    config = SpecConfig(num_speculative_tokens=gamma, calibration_cache=str(tmp_path), **options)
    return EmbeddedBackend(policy(name), config)


def learned(name, tmp_path, gamma=3, **options):
    backend = backend_for(name, tmp_path, gamma, **options)
    backend.generate(PROMPTS * 4, PARAMS)
    assert not backend.take_stats().drafted  # cold: plain decoding
    backend.refresh()
    return backend


def plain(name, seed=(0,), copies=4):
    return RolloutEngine(policy(name)).generate(PROMPTS * copies, PARAMS, seed=seed)
