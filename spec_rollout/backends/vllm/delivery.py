"""The policy and the draft on their way to vLLM, between two rollouts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from spec_rollout.backends.vllm.draft import draft_tensors, mismatch
from spec_rollout.backends.vllm.engine import UNTESTED, VLLMEngine
from spec_rollout.draft.learner import DraftLearner

Whole = Callable[[], AbstractContextManager]


class Delivery:
    """What one vLLM was given, and whether it arrived.

    Attributes:
        version: pushes so far; vLLM holds both under the number of the last one.
        pushed: versions of the policy and of the draft in the last push; None makes the next one certain.
        lost: what is wrong with the draft that vLLM holds since the last push; None if nothing is.
    """

    def __init__(self):
        self.version = 0
        self.pushed: tuple[int, int] | None = None
        self.lost: str | None = None
        self._told = False
        """Whether a verification that was not asked for was told."""

    def push(
        self, engine: VLLMEngine, learner: DraftLearner | None, state: tuple[int, int], whole: Whole = nullcontext
    ) -> None:
        """Give `engine` the policy and the draft of `learner`, if either has changed or vLLM was started again. Ranks
        of which one would push alone would wait for each other: what goes wrong on one of them does not count here.

        Args:
            state: versions of the policy and of the draft.
            whole: within it the policy's weights that the draft shares are whole.

        Raises:
            EngineRestarted: vLLM was restarted after the push.
            RuntimeError: vLLM does not hold the policy that was pushed.
        """
        held = [self.version, 0 if learner is None else self.version]
        if state == self.pushed and engine.versions() == held:
            return
        self.version = max(self.version, *engine.versions()) + 1  # a server may hold another run's
        tensors = None
        if learner is not None:
            with whole():
                tensors = draft_tensors(learner)
        engine.load(None if tensors is None else tensors.items(), self.version)
        self.lost = mismatch(engine, tensors, self.version)
        self.pushed = state
        if self.lost:
            use = (
                "The draft head is off (num_speculative_tokens=0)"
                if engine.live_schedule
                else "vLLM guesses with another draft"
            )
            warnings.warn(
                f"{use} until the next push: {self.lost}. No sample is affected.", RuntimeWarning, stacklevel=3
            )

    def tell_verification(self, engine: VLLMEngine) -> None:
        """Say once that guesses are judged otherwise than wherever that was tested."""
        if engine.verification == "rejection" and not self._told:
            self._told = True
            warnings.warn(UNTESTED, RuntimeWarning, stacklevel=5)
