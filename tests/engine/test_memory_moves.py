"""While slots are laid out anew, little of what they hold is there twice, whichever pass decodes."""

import pytest

from spec_rollout.config import SpecConfig
from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.gamma import FixedGamma
from spec_rollout.records import SamplingParams
from tests.engine.test_memory import Memory
from tests.tiny import make_policy


def sampler(model, path: str) -> RolloutEngine:
    if path != "lean with a head":
        return RolloutEngine(model, SpecConfig(num_speculative_tokens=0))
    drafter = EagleDrafter(EagleHead(HeadConfig.for_target(model.config)).eval(), PolicyView(model))
    drafter.ready = True
    return RolloutEngine(model, SpecConfig(num_speculative_tokens=1), drafter=drafter, controller=FixedGamma(1))


@pytest.mark.parametrize("path", ["lean", "lean with a head", "transformers"])
@pytest.mark.parametrize("keeps", [False, True])
def test_slots_that_move_are_not_there_twice(path, keeps, monkeypatch):
    """All rows grow, and at the end all leave at once: with `keeps` into the memory of their own slots."""
    if path == "transformers":
        monkeypatch.setattr("spec_rollout.engine.lean.choice.family_of", lambda model: None)
    model = make_policy("llama", num_hidden_layers=12, head_dim=64, max_position_embeddings=512)
    engine = sampler(model, path)
    if keeps:
        engine.keep_rows()
    prompts, params = [[i + 1] * 100 for i in range(16)], SamplingParams(max_new_tokens=45)
    engine.generate([[1]], SamplingParams(max_new_tokens=2))  # proven and weighed
    engine.forget()
    with Memory([*model.parameters(), *model.buffers()]) as memory:
        engine.generate(prompts, params)
    assert engine.target.path == path.split()[0]
    assert engine.stats.cache_bytes < memory.peak < 1.4 * engine.stats.cache_bytes
