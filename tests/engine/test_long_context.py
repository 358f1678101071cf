"""Sixteen thousand tokens of context on a tiny policy: read in pieces, and the same tokens with guesses."""

from __future__ import annotations

import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.prefill import FURTHER_TOKENS, PREFILL_TOKENS
from spec_rollout.engine.target import Target
from spec_rollout.gamma import FixedGamma
from spec_rollout.records import SamplingParams
from tests.tiny import VOCAB, make_policy

LONG = 16_384
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
PARAMS = SamplingParams(max_new_tokens=24)


def test_sixteen_thousand_tokens_of_context(monkeypatch):
    model = make_policy("llama", num_hidden_layers=2, max_position_embeddings=2 * LONG, **SHAPE)
    ids = torch.randint(VOCAB, (LONG,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [ids, ids[-9:], ids]  # a short row beside two of the same long prompt
    plain = RolloutEngine(model).generate(prompts, PARAMS)
    with torch.no_grad():
        whole = [*ids, *plain[0].token_ids]
        logits = model(torch.tensor([whole[:-1]]), use_cache=False, logits_to_keep=PARAMS.max_new_tokens).logits[0]
    truth = logits.log_softmax(-1).gather(1, torch.tensor(whole[LONG:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(plain[0].logprobs), truth, atol=1e-4, rtol=0)

    pieces, forward = [], Target.forward

    def seen(self, cache, slots, ids, *others, **options):
        if options.get("keep_logits"):
            pieces.append(tuple(ids.shape))
        return forward(self, cache, slots, ids, *others, **options)

    engine = RolloutEngine(model, SpecConfig(max_slots=3), drafter=OracleDrafter(plain), controller=FixedGamma(3))
    monkeypatch.setattr(Target, "forward", seen)
    guessed = engine.generate(prompts, PARAMS)
    assert [c.token_ids for c in guessed] == [c.token_ids for c in plain]
    assert engine.stats.mean_acceptance_length > 3 and engine.stats.drafter_failures == 0
    long = [width for rows, width in pieces if rows * width > 1000]
    further = (LONG - PREFILL_TOKENS) // FURTHER_TOKENS
    # The last token goes with a step.
    assert long == [PREFILL_TOKENS] + [FURTHER_TOKENS] * (further - 1) + [FURTHER_TOKENS - 1]
