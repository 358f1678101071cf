"""What a rollout leaves to learn from is what the policy computed, and all that it leaves."""

import gc

import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft import collector, spans
from spec_rollout.draft.collector import Collector
from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.features import FeatureBuffer
from spec_rollout.draft.ngram_drafter import NgramDrafter
from spec_rollout.draft.ngrams import History
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.self_drafter import SelfDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.room import GIB
from spec_rollout.engine.rows import Rows
from spec_rollout.gamma import FixedGamma
from spec_rollout.records import SamplingParams
from tests.engine.test_memory import Memory
from tests.tiny import PROMPTS, Scripted, make_policy, policy

PARAMS = SamplingParams(max_new_tokens=90, temperature=0.9)
ENTERING = [PROMPTS[0], *PROMPTS[1:3], PROMPTS[0], *PROMPTS[3:]]
LIMITS = [90, 24, 47, 73, 60, 9, 33, 52]


def eagle(model, buffer, ready=True):
    drafter = EagleDrafter(EagleHead(HeadConfig.for_target(model.config)).eval(), PolicyView(model), buffer)
    drafter.ready = ready
    return drafter


def collect_only(model, buffer):
    return eagle(model, buffer, ready=False)


def ngrams(model, buffer):
    history = History(torch.device("cpu"))
    history.add([(PROMPTS[0], [1, 2, 3, 4, 5, 6])])
    return NgramDrafter(history, eagle(model, buffer).collector)


def quantized(model, buffer):
    return SelfDrafter(RolloutEngine(model).target, eagle(model, buffer).collector)


@pytest.fixture
def short_spans(monkeypatch):
    monkeypatch.setattr(spans, "STRIDE", 30)
    for module in (spans, collector):
        monkeypatch.setattr(module, "CONTEXT", 4)


@pytest.mark.parametrize("rows", [None, 2.2])
@pytest.mark.parametrize("make", [eagle, collect_only, ngrams])
def test_the_features_are_those_of_the_policys_own_pass(make, rows, short_spans, monkeypatch):
    """In spans of rows that enter, move, take over a prompt late, give way and come back; each token once."""
    check_features(make, rows, monkeypatch)


def check_features(make, rows, monkeypatch):
    monkeypatch.setattr(collector, "READ", 20)
    monkeypatch.setattr(Collector, "slot_bytes", lambda self, capacity, reads=False: 0)
    model, buffer = policy("llama"), FeatureBuffer(10_000)
    drafter = make(model, buffer)
    options = {}
    if rows:
        engine = RolloutEngine(model)
        with engine.target.rollout():
            token, slot = engine.target.cache_bytes
        options["max_cache_gib"] = rows * (128 * (token + Rows.token_bytes) + slot + drafter.slot_bytes(128)) / GIB
    engine = RolloutEngine(
        model, SpecConfig(max_slots=8 if rows else 3, **options), drafter=drafter, controller=Scripted(2, 0, 0, 7, 0)
    )
    drawn = engine.generate(ENTERING, PARAMS, max_new_tokens=LIMITS)
    assert bool(engine.stats.preemptions) == bool(rows) and engine.stats.drafter_failures == 0
    layers, places = HeadConfig.for_target(model.config).aux_layers, []
    known = [[*prompt, *c.token_ids] for prompt, c in zip(ENTERING, drawn, strict=True)]
    for sample in buffer.samples:
        span = slice(sample.first, sample.first + len(sample.tokens))
        (row,) = {i for i, ids in enumerate(known) if ids[span] == sample.tokens.tolist()}
        assert sample.group == hash(tuple(ENTERING[row])) and sample.prompt == len(ENTERING[row])
        with torch.no_grad():
            states = model(torch.tensor([known[row]]), output_hidden_states=True).hidden_states
        whole = torch.cat([*(states[i][0] for i in layers), states[-1][0]], -1)
        torch.testing.assert_close(sample.features, whole[span][:-1], atol=2e-4, rtol=2e-4)
        last = sample.first + len(sample.features) - 1
        places += [(row, p + 2 - sample.prompt) for p in range(sample.first, last) if p + 2 >= sample.prompt]
    assert sorted(places) == [(i, t) for i, p in enumerate(ENTERING) for t in range(len(p) == 1, LIMITS[i])]


def test_a_sibling_without_its_prompt_is_noticed(short_spans, monkeypatch):
    """Broken on purpose: the entries of the prompt are not those that it takes over."""
    honest = Collector.copy

    def copy(self, rows, source, target):
        honest(self, rows, source, target)
        self.window.kept[target.device, :4] = 0

    monkeypatch.setattr(Collector, "copy", copy)
    with pytest.raises(AssertionError):
        check_features(eagle, None, monkeypatch)


@pytest.mark.parametrize("make", [eagle, collect_only, ngrams, quantized])
def test_memory_does_not_follow_the_rows_and_is_given_back(make, short_spans):
    """Bytes of the windows, of what is learned from, and after the rollout of the latter alone."""
    model = make_policy("llama", max_position_embeddings=2048)
    held = {}
    for new in (160, 300):
        buffer = FeatureBuffer(400)
        drafter = make(model, buffer)
        own = drafter.collector
        engine = RolloutEngine(model, SpecConfig(max_slots=4), drafter=drafter, controller=FixedGamma(0))
        sizes = []
        engine.progress = lambda *_, own=own, sizes=sizes: sizes.append(own.window.kept.nbytes)
        engine.generate([[i + 1] * 3 for i in range(4)], SamplingParams(max_new_tokens=8))  # made once
        buffer.clear()
        before = {id(x) for x in tensors()}
        engine.generate([[i + 1] * 3 for i in range(6)], SamplingParams(max_new_tokens=new))
        held[new] = max(sizes)
        assert drafter.slot_bytes(10**6) * 4 >= max(sizes) > 0
        assert 0 < buffer.tokens <= 400 and not buffer.open
        kept = {id(t) for s in buffer.samples for t in (s.tokens, s.features)}
        assert sum(s.features.nbytes for s in buffer.samples) <= 400 * 4 * model.config.hidden_size * 4
        left = [x for x in tensors() if id(x) not in before | kept and x.untyped_storage().nbytes() > 4096]
        assert not [tuple(x.shape) for x in left]
    assert held[160] == held[300]


def tensors() -> list[torch.Tensor]:
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is torch.Tensor]


def test_a_head_that_has_not_learned_keeps_nothing_without_a_buffer():
    model = policy("llama")
    drafter = eagle(model, None, ready=False)
    assert drafter.slot_bytes(100) == 0
    engine = RolloutEngine(model, SpecConfig(), drafter=drafter, controller=FixedGamma(0))
    with Memory([*model.parameters()]) as memory:
        engine.generate(PROMPTS, SamplingParams(max_new_tokens=9))
    plain = RolloutEngine(model, SpecConfig())
    with Memory([*model.parameters()]) as without:
        plain.generate(PROMPTS, SamplingParams(max_new_tokens=9))
    rows = Rows.token_bytes // 2 * len(PROMPTS) * 64 + 2**15  # the copy of the rows that it is shown
    assert memory.peak <= without.peak + rows and drafter.window.kept is None and not drafter.cache.keys
