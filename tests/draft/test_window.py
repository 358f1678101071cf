"""The head guesses from a window over the target's features as if all of them were kept."""

import pytest
import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft import collector
from spec_rollout.draft.collector import Collector
from spec_rollout.draft.drafter import EagleDrafter
from spec_rollout.draft.eagle import EagleHead, HeadConfig
from spec_rollout.draft.features import FeatureBuffer
from spec_rollout.draft.mtp import MtpDrafter
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.window import Window
from spec_rollout.engine import prefill
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.room import GIB
from spec_rollout.engine.rows import Rows
from spec_rollout.gamma import FixedGamma
from spec_rollout.records import SamplingParams
from tests.backends.learned import PARAMS as PARAMS_OF_LEARNED
from tests.backends.learned import learned
from tests.draft.test_mtp import random_head
from tests.tiny import PROMPTS, VOCAB, Scripted, policy

PARAMS = SamplingParams(max_new_tokens=60, temperature=0.9)
ENTERING = [PROMPTS[0], *PROMPTS[1:3], PROMPTS[0], *PROMPTS[3:]]
LIMITS = [60, 24, 47, 33, 60, 9, 33, 52]
"""The fourth row takes over the prompt of the first one when that is 24 tokens beyond it."""
GAMMAS = (2, *[0] * 7, 3, *[0] * 8, 1, *[0] * 9, 2, *[0] * 29, 7)
"""Plain decoding for fewer steps than a window has entries, and for many more."""


def drafter_for(kind: str, buffer: FeatureBuffer | None = None):
    if kind == "mtp":
        model = policy("qwen3_5_text")
        drafter = MtpDrafter(random_head(model), PolicyView(model), buffer)
    else:
        model = policy("llama")
        head = EagleHead(HeadConfig.for_target(model.config)).eval()
        drafter = EagleDrafter(head, PolicyView(model), buffer)
    drafter.ready = True
    return model, drafter


class Watched:
    """What a drafter guesses in a rollout, by row and place: the tokens, and the scores that they were drawn from."""

    def __init__(self, kind="eagle", bound=None, gammas=GAMMAS, buffer=None, slots=3, prompts=ENTERING, limits=LIMITS):
        model, self.drafter = drafter_for(kind, buffer)
        self.guesses, self.widths = {}, []
        honest, read = self.drafter.propose, self.drafter._read_until

        def propose(rows, gamma, *others):
            drawn = honest(rows, gamma, *others)
            for n in range(rows.count):
                place = int(rows.indices[n]), int(rows.lengths[n])
                self.guesses[place] = drawn[n].tolist(), torch.stack([s[n] for s in self.drafter._scores])
            return drawn

        def read_until(rows, start, stop, lengths, most):
            left = read(rows, start, stop, lengths, most)
            self.widths += [] if most else [left]
            return left

        self.drafter.propose, self.drafter._read_until = propose, read_until
        options = {} if bound is None else {"max_cache_gib": bound / GIB}
        self.engine = RolloutEngine(
            model, SpecConfig(max_slots=slots, **options), drafter=self.drafter, controller=Scripted(*gammas)
        )
        self.completions = self.engine.generate(prompts, PARAMS, max_new_tokens=limits)
        assert self.engine.stats.drafter_failures == 0

    def same_as(self, other) -> None:
        assert self.guesses.keys() == other.guesses.keys() and len(self.guesses) > 10
        for place, (tokens, scores) in self.guesses.items():
            assert tokens == other.guesses[place][0], place
            torch.testing.assert_close(scores, other.guesses[place][1], atol=1e-5, rtol=1e-5)
        for mine, theirs in zip(self.completions, other.completions, strict=True):
            assert (mine.token_ids, mine.num_accepted) == (theirs.token_ids, theirs.num_accepted)


def unbounded(patch, **options) -> Watched:
    """The reference keeps the features of every token."""
    with patch.context() as within:
        within.setattr(collector, "READ", 4096)
        return Watched(**options)


@pytest.mark.parametrize("kind", ["eagle", "mtp"])
@pytest.mark.parametrize("width", [16, 17, 24])
def test_the_guesses_are_those_with_all_features_kept(kind, width, monkeypatch):
    """Rows enter, move and leave, siblings enter late, plain decoding lasts to the window's edge and beyond it."""
    expected = unbounded(monkeypatch, kind=kind)
    monkeypatch.setattr(collector, "READ", width)
    got = Watched(kind)
    got.same_as(expected)
    assert got.widths and not expected.widths


@pytest.mark.parametrize(("new", "reads"), [(15, 0), (16, 0), (17, 1), (32, 1), (33, 2)])
def test_plain_decoding_reads_once_per_window(new, reads, monkeypatch):
    """When the window is full, and not before."""
    monkeypatch.setattr(collector, "READ", 16)
    got = Watched(gammas=[0], prompts=[[1, 2, 3]], limits=[new], slots=1)
    assert len(got.widths) == reads


def bytes_of(kind):
    """What a row takes for each token, and besides."""
    model, drafter = drafter_for(kind)
    engine = RolloutEngine(model)
    with engine.target.rollout():
        token, slot = engine.target.cache_bytes
    return token + Rows.token_bytes + drafter.slot_bytes(100) // 100, slot


@pytest.mark.parametrize("kind", ["eagle", "mtp"])
def test_rows_that_give_way_are_guessed_for_as_before(kind, monkeypatch):
    monkeypatch.setattr(
        Collector, "slot_bytes", lambda self, capacity, reads=False: 0
    )  # so that the same rows give way
    options = {"kind": kind, "slots": 8}
    token, slot = bytes_of(kind)
    options["bound"] = int(2.2 * (96 * token + slot))
    expected = unbounded(monkeypatch, **options)
    monkeypatch.setattr(collector, "READ", 16)
    got = Watched(**options)
    assert got.engine.stats.preemptions > 0
    got.same_as(expected)


def test_long_prompts_are_read_piece_by_piece(monkeypatch):
    prompts = [[i % VOCAB for i in range(50)], [3] * 41, [i % VOCAB for i in range(50)], [5, 6]]
    options = {"prompts": prompts, "limits": [9, 30, 20, 30], "slots": 2, "gammas": (2,)}
    expected = unbounded(monkeypatch, **options)
    monkeypatch.setattr(collector, "READ", 8)
    monkeypatch.setattr(prefill, "PREFILL_TOKENS", 13)
    Watched(**options).same_as(expected)


@pytest.mark.parametrize("kind", ["eagle", "mtp"])
def test_a_later_piece_of_a_prompt_sees_the_earlier_ones(kind, monkeypatch):
    options = {"kind": kind, "gammas": (2,), "prompts": [list(range(1, 60)), [5, 6, 7]], "limits": [12, 12]}
    whole = Watched(**options)
    monkeypatch.setattr(prefill, "PREFILL_TOKENS", 23)
    monkeypatch.setattr(prefill, "FURTHER_TOKENS", 18)  # wider than the lean pass takes
    Watched(**options).same_as(whole)


def test_a_pass_wider_than_the_window_widens_it(monkeypatch):
    options = {"gammas": (0, 0, 7, 0), "limits": [40] * 8}
    expected = unbounded(monkeypatch, **options)
    monkeypatch.setattr(collector, "READ", 4)
    got = Watched(**options)
    got.same_as(expected)


def test_a_sibling_needs_the_prompts_last_feature(monkeypatch):
    """Broken on purpose: it does not take over the one that stays."""
    monkeypatch.setattr(collector, "READ", 16)
    expected = Watched(gammas=(1,))

    def copy(self, rows, source, target):
        self.kept[target.device, 1:] = self.kept[source.device, 1:]
        self.seen[target.host] = self.seen[source.host].clip(max=rows.lengths[target.host])

    monkeypatch.setattr(Window, "copy", copy)
    with pytest.raises(AssertionError):
        Watched(gammas=(1,)).same_as(expected)


def test_what_is_read_too_late_is_noticed(monkeypatch):
    """Broken on purpose: the window goes round before the head reads."""
    expected = unbounded(monkeypatch)
    monkeypatch.setattr(collector, "READ", 16)
    honest = EagleDrafter._read_until
    monkeypatch.setattr(EagleDrafter, "_read_until", lambda self, *given: honest(self, *given) if given[-1] else 0)
    with pytest.raises(AssertionError):
        Watched().same_as(expected)


def test_a_head_that_has_learned_is_accepted_as_before(tmp_path, monkeypatch):
    """At any window, whether rows wait or not."""
    backend = learned("llama", tmp_path)
    found = set()
    for width in (4096, 16, 5):
        monkeypatch.setattr(collector, "READ", width)
        for slots in (28, 5):
            engine = RolloutEngine(
                policy("llama"), SpecConfig(max_slots=slots), drafter=backend.drafter, controller=FixedGamma(2)
            )
            drawn = engine.generate(PROMPTS * 4, PARAMS_OF_LEARNED, seed=(3,))
            found.add(tuple((*c.token_ids, c.num_drafted, c.num_accepted) for c in drawn))
    assert len(found) == 1 and sum(row[-1] for row in found.pop()) > 20
