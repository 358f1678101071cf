"""The completions follow the target's law: exact enumeration on a tiny vocabulary, and transformers.generate.

A χ² test with a false-alarm probability of 1e-6; with about 30 such tests the whole file would cry wolf for one seed
in 30 000, and the seeds are fixed. What a sampler may do wrong is far beyond that, as the controls show.
"""

import itertools
from collections import Counter

import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter, RandomDrafter
from spec_rollout.engine import noise
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.gumbel_max import block_size, num_blocks
from spec_rollout.records import SamplingParams
from tests.tiny import Scripted, make_policy, processed

pytestmark = pytest.mark.any_device

FALSE_ALARM = 1e-6
VOCAB, LENGTH, DRAWS = 4, 3, 4000
PROMPT = [1, 3]
LAWS = {
    "T=1": SamplingParams(max_new_tokens=LENGTH),
    "T=0.6": SamplingParams(max_new_tokens=LENGTH, temperature=0.6),
    "top-k": SamplingParams(max_new_tokens=LENGTH, top_k=3, temperature=1.5),
    "top-p, min-p": SamplingParams(max_new_tokens=LENGTH, top_p=0.9, min_p=0.08),
    "penalty": SamplingParams(max_new_tokens=LENGTH, repetition_penalty=1.6),
}
MODEL = make_policy("llama", torch.float64, vocab_size=VOCAB, hidden_size=16, std=0.3)


class NoiseDrafter(RandomDrafter):
    """Guesses by the target's own noise alone: what comes true is then as far from independent of it as can be."""

    def propose(self, rows, gamma, gumbels, temperature):
        return self.favoured(gumbels[:, :gamma])

    def favoured(self, gumbels):
        """The token [B, T] that the noise of blocks and places [B, T, N] speaks for."""
        blocks, places = gumbels.split([num_blocks(VOCAB), block_size(VOCAB)], -1)
        return blocks.argmax(-1) * block_size(VOCAB) + places.argmax(-1)


class ContraryDrafter(NoiseDrafter):
    """Guesses what the noise speaks against."""

    def favoured(self, gumbels):
        return super().favoured(-gumbels)


def p_value(statistic: float, freedom: int) -> float:
    """Probability that χ² with `freedom` degrees exceeds `statistic`."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def fits(counts: Counter, law: dict[tuple, float]) -> float:
    """p-value of `counts` under `law`; outcomes expected less than five times are taken together."""
    total = sum(counts.values())
    if any(law.get(outcome, 0.0) == 0.0 for outcome in counts):
        return 0.0
    rare = [o for o, p in law.items() if p * total < 5]
    cells = [(counts[o], p * total) for o, p in law.items() if p * total >= 5]
    cells.append((sum(counts[o] for o in rare), sum(law[o] for o in rare) * total))
    cells = [(seen, expected) for seen, expected in cells if expected > 0]
    return p_value(sum((seen - e) ** 2 / e for seen, e in cells), len(cells) - 1)


@torch.no_grad()
def joint_law(params: SamplingParams) -> dict[tuple, float]:
    """Probability of every completion of PROMPT, by teacher forcing each of them."""
    outcomes = list(itertools.product(range(VOCAB), repeat=LENGTH))
    logits = MODEL(torch.tensor([[*PROMPT, *o] for o in outcomes]), use_cache=False).logits
    law = {}
    for row, outcome in enumerate(outcomes):
        law[outcome] = 1.0
        for place, token in enumerate(outcome):
            end = len(PROMPT) + place
            z = processed(MODEL, params, [*PROMPT, *outcome[:place]], logits[row, end - 1]).double()
            law[outcome] *= float(z.softmax(-1)[token])
    assert abs(sum(law.values()) - 1) < 1e-6
    return law


def draws(params: SamplingParams, drafter=None, seed: int = 0) -> Counter:
    gammas = Scripted(1, 3, 0, 2) if drafter else None
    engine = RolloutEngine(MODEL, SpecConfig(max_slots=2000), drafter=drafter, controller=gammas)
    completions = engine.generate([PROMPT] * DRAWS, params, seed=(seed,))
    assert drafter is None or engine.stats.drafted > 0
    return Counter(tuple(c.token_ids) for c in completions)


@pytest.mark.parametrize("law", LAWS)
def test_joint_law(law):
    """The engine's completions, plain and under four drafters with other noise each, fit the enumerated joint law."""
    params = LAWS[law]
    exact = joint_law(params)
    for seed, drafter in enumerate((None, RandomDrafter(), NoiseDrafter(), ContraryDrafter())):
        assert fits(draws(params, drafter, seed), exact) > FALSE_ALARM


@pytest.mark.parametrize("wrong", ["T=0.6", "top-p, min-p", "penalty"])
def test_control_another_law_is_rejected(wrong):
    assert fits(draws(LAWS["T=1"]), joint_law(LAWS[wrong])) < FALSE_ALARM


def test_control_a_slightly_wrong_temperature_is_rejected():
    params = SamplingParams(max_new_tokens=LENGTH, temperature=1.15)
    assert fits(draws(params), joint_law(LAWS["T=1"])) < FALSE_ALARM


def test_control_noise_reused_at_the_next_position_is_rejected(monkeypatch):
    """Each token alone would still follow its marginal law; only the joint one shows it."""
    honest = noise.gumbel
    monkeypatch.setattr(noise, "gumbel", lambda keys, steps, size: honest(keys, steps // 2, size))
    assert fits(draws(LAWS["T=1"]), joint_law(LAWS["T=1"])) < FALSE_ALARM


def test_control_noise_shared_by_siblings_is_rejected(monkeypatch):
    honest = noise.gumbel
    monkeypatch.setattr(noise, "gumbel", lambda keys, steps, size: honest(keys & 255 & ~keys[:, :1], steps, size))
    assert fits(draws(LAWS["T=1"]), joint_law(LAWS["T=1"])) < FALSE_ALARM


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("llama", SamplingParams(max_new_tokens=2)),
        ("gpt2", SamplingParams(max_new_tokens=2, temperature=0.7, top_k=6)),
        ("gemma3_text", SamplingParams(max_new_tokens=2, temperature=1.2, top_p=0.9)),
        ("qwen2", SamplingParams(max_new_tokens=2, repetition_penalty=1.5, min_p=0.05)),
    ],
)
def test_like_generate(name, params):
    """Two samples, ours under speculation and transformers' own, are of one law (χ² of homogeneity); a third, drawn at
    another temperature, is not."""
    model = make_policy(name, vocab_size=8)
    options = {
        "do_sample": True,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p or None,
        "repetition_penalty": params.repetition_penalty,
        "max_new_tokens": 2,
        "pad_token_id": 0,
    }

    def theirs(**other) -> Counter:
        ids = torch.tensor([PROMPT] * DRAWS)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            output = model.generate(ids, attention_mask=torch.ones_like(ids), **{**options, **other})
        return Counter(map(tuple, output[:, len(PROMPT) :].tolist()))

    guess = RolloutEngine(model, SpecConfig(num_speculative_tokens=0)).generate([PROMPT], params, seed=(9,)) * DRAWS
    engine = RolloutEngine(model, SpecConfig(num_speculative_tokens=1, max_slots=2000), drafter=OracleDrafter(guess))
    ours = Counter(tuple(c.token_ids) for c in engine.generate([PROMPT] * DRAWS, params))
    assert engine.stats.mean_acceptance_length > 1
    assert homogeneous(ours, theirs()) > FALSE_ALARM
    assert homogeneous(ours, theirs(temperature=params.temperature * 1.4)) < FALSE_ALARM


def homogeneous(a: Counter, b: Counter) -> float:
    """p-value that two samples of equal size are of one law; outcomes seen less than ten times are taken together."""
    rare = [o for o in a | b if a[o] + b[o] < 10]
    cells = [(a[o], b[o]) for o in a | b if a[o] + b[o] >= 10]
    cells.append((sum(a[o] for o in rare), sum(b[o] for o in rare)))
    cells = [(x, y) for x, y in cells if x + y]
    return p_value(sum((x - y) ** 2 / (x + y) for x, y in cells), len(cells) - 1)
