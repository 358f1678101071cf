"""Conversations in turns: each prompt is the one before with its completion and what a tool says to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from spec_rollout.config import SpecConfig
from spec_rollout.draft.references import OracleDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import Completion, SamplingParams
from tests.tiny import PROMPTS, VOCAB, Scripted, assert_same, policy, reference

TOLD = 3
"""Tokens of what a tool says."""
GAMMAS = (3, 0, 5, 1)
TURNS = 3
ERROR = 1e-3
"""Of log-probs."""


def keeping(model, drafter=None, **config) -> RolloutEngine:
    """An engine that keeps rows."""
    engine = RolloutEngine(model, SpecConfig(**config), drafter=drafter, controller=drafter and Scripted(*GAMMAS))
    engine.keep_rows()
    return engine


def told(turn: int, row: int) -> list[int]:
    return [(7 * row + 11 * turn + i) % VOCAB for i in range(TOLD)]


class Talk:
    """Turns of `engine` that go on where the last one ended; `prompts` are the next ones."""

    def __init__(self, engine: RolloutEngine, prompts: Sequence[Sequence[int]] = PROMPTS, **params):
        self.engine, self.prompts, self.turn = engine, [list(prompt) for prompt in prompts], 0
        self.params = SamplingParams(**{"max_new_tokens": 8} | params)
        self.read: list[int] = []
        """Prompt tokens that each turn read."""

    def take(self) -> list[Completion]:
        """The completions of one turn."""
        before = self.engine.stats.prefilled_tokens
        got = self.engine.generate(self.prompts, self.params, seed=(self.turn,))
        self.read.append(self.engine.stats.prefilled_tokens - before)
        for row, completion in enumerate(got):
            self.prompts[row] += [*completion.token_ids, *told(self.turn, row)]
        self.turn += 1
        return got

    def go(self, turns: int) -> list[list[Completion]]:
        return [self.take() for _ in range(turns)]


@cache
def drawn(name: str, turns: int = TURNS):
    """Completions of each turn, by whole forward passes."""
    prompts, found = [list(prompt) for prompt in PROMPTS], []
    for turn in range(turns):
        found.append(reference(policy(name), prompts, SamplingParams(max_new_tokens=8), (turn,)))
        for row, completion in enumerate(found[-1]):
            prompts[row] += [*completion.token_ids, *told(turn, row)]
    return found


def two_thirds(expected) -> OracleDrafter:
    return OracleDrafter(
        [replace(c, token_ids=[(t + (i % 3 == 0)) % VOCAB for i, t in enumerate(c.token_ids)]) for c in expected]
    )


def check(name: str, slots: int = 64) -> Talk:
    """Each turn draws the tokens of whole forward passes, by a drafter that is right two times in three."""
    talk = Talk(keeping(policy(name), OracleDrafter(drawn(name)[0]), max_slots=slots))
    for expected in drawn(name):
        talk.engine.drafter = two_thirds(expected)
        assert_same(talk.take(), expected, ERROR)
    assert 1 < talk.engine.stats.mean_acceptance_length < 3
    return talk


def nudged(model):
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.05)
