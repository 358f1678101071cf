"""The rollout engine: batched speculative decoding in which verification is a comparison."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn
from transformers import PreTrainedTokenizerBase

from spec_rollout.config import SpecConfig
from spec_rollout.engine.guarded_drafter import GuardedDrafter
from spec_rollout.engine.kept_rows import KeptRows
from spec_rollout.engine.out_of_memory import is_out_of_memory, what_to_lower
from spec_rollout.engine.protocols import Drafter, ReadsCache, Recorder
from spec_rollout.engine.requests import make_requests
from spec_rollout.engine.rollout import Rollout
from spec_rollout.engine.room import GIB, SHARE, free_memory
from spec_rollout.engine.virtual_tokens import make_target
from spec_rollout.records import Completion, Controller, Request, RolloutStats, SamplingParams, StepStats

logger = logging.getLogger(__name__)


class RolloutEngine:
    """Samples completions from `model`, any Hugging Face causal language model with standard attention.

    With `config.verification="coupled"` the completions depend on the policy, the prompts, `params` and `seed` alone:
    not on the drafter, not on the number of guessed tokens, not on how many rows share a batch. Without a `drafter` it
    is a plain batched decoder.

    Args:
        model: the policy; it is run in evaluation mode and left as it was found.
        config: its `num_speculative_tokens` (if no controller is given) and `max_slots` are used here.
        drafter, controller: who guesses, and who says how far.
        tokenizer: needed for stop strings only.

    Raises:
        UnsupportedModelError: the model cannot be decoded on ragged rows.
        ValueError: a drafter whom neither a controller nor `config` tells how far to guess.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SpecConfig | None = None,
        *,
        drafter: Drafter | None = None,
        controller: Controller | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.config = config or SpecConfig()
        if drafter is not None and controller is None and self.config.num_speculative_tokens is None:
            raise ValueError(
                "A drafter without a controller needs num_speculative_tokens in `config`, which is None: give the "
                "number of tokens to guess, 0 for plain decoding, or a controller that chooses it."
            )
        self.target = make_target(model, self.config.compile_passes, self.config.calibration_cache)
        self.drafter, self.controller, self.tokenizer = drafter, controller, tokenizer
        self.recorder: Recorder | None = None
        self.cache = self.target.make_cache()
        self._bound: int | None = None
        self.kept_rows: KeptRows | None = None
        """Where finished rows are kept for later calls, whose prompts may extend them; None, as at first, keeps none.
        See `keep_rows`."""
        self.stats = RolloutStats()
        self.progress: Callable[[int, int], None] | None = None
        """Told after each step how many requests are not finished yet, and how many tokens the step emitted."""
        self.beside: Callable[[], dict[str, int]] = dict
        """Bytes of what there is beside rollouts, by the option that bounds them."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        *,
        seed: Sequence[int] = (0,),
        max_new_tokens: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Sample one completion per prompt entry, in order; equal prompts are prefilled once.

        Args:
            prompts: token ids of each prompt.
            seed: non-negative integers; with the entry's index they name its noise.
            max_new_tokens: a bound per entry, in place of `params.max_new_tokens`.

        Raises:
            ValueError: an empty prompt, a token outside the vocabulary, or a prompt that with its new tokens exceeds
                the context; the message names the entry, the bound and the remedy.
            FloatingPointError: the policy's logits are NaN or infinite; the message names the step.
            CacheBoundError: a row that does not fit into `max_cache_gib` by itself.
            RolloutMemoryError: memory ran out; the message names the option to lower.
        """
        params, target = params or SamplingParams(), self.target
        bounds = (target.vocab_size, target.room, target.switches)
        requests = make_requests(prompts, params, seed, max_new_tokens, *bounds)
        if not requests:
            return []
        before, prefill_s = len(self.stats.steps), self.stats.prefill_s
        began, rollout = time.perf_counter(), None
        try:
            with self.target.rollout():
                rollout = self.start(requests, params, self.kept_rows)
                self._decode(rollout)
                completions = rollout.results.completions()
            if self.kept_rows is not None:
                self.kept_rows.close(requests, completions)
        except (RuntimeError, MemoryError) as error:
            sizes = self.beside() | ({} if rollout is None else rollout.sizes)
            self.forget()
            if not is_out_of_memory(error):
                raise
            rollout = None
            traceback.clear_frames(error.__traceback__)  # they hold what it took
            raise what_to_lower(error, sizes) from error
        except BaseException:
            self.forget()
            raise
        finally:
            self.cache.release()
            GuardedDrafter(self.drafter, self.stats).end()
        seconds = time.perf_counter() - began
        self.stats.seconds += seconds
        self.stats.lean_steps += (len(self.stats.steps) - before) * ("lean" in target.path)
        self.stats.compiled_steps += (len(self.stats.steps) - before) * (
            "compiled" in target.path or "graphs" in target.path
        )
        if self.recorder is not None:
            own = RolloutStats(self.stats.steps[before:], seconds, self.stats.prefill_s - prefill_s)
            self.recorder.rollout(requests, completions, own)
        return completions

    def keep_rows(self) -> None:
        """From here on finished rows stay, within `max_cache_gib`, so that a prompt that begins as one of them is read
        from where it goes on. A change of the policy drops them; but call `forget` before weights are written through
        `.data`, and before memory is needed elsewhere."""
        self.kept_rows = KeptRows() if self.kept_rows is None else self.kept_rows

    def forget(self) -> None:
        """Drop the rows that were kept, and give their memory back."""
        if self.kept_rows is not None:
            self.kept_rows.clear()

    def start(self, requests: list[Request], params: SamplingParams, kept: KeptRows | None = None) -> Rollout:
        """A rollout of `requests`, not yet admitted; to be driven within `target.rollout()`."""
        reader: object = self.drafter
        if isinstance(reader, ReadsCache):
            reader.policy_cache = self.cache
        return Rollout(
            requests,
            params,
            target=self.target,
            cache=self.cache,
            stats=self.stats,
            config=self.config,
            drafter=self.drafter,
            tokenizer=self.tokenizer,
            bound=self.bound,
            kept=kept,
        )

    @property
    def bound(self) -> int | None:
        """Bytes that slots may take at one time; found at the first rollout where `config` does not say."""
        if self.config.max_cache_gib is not None:
            return int(self.config.max_cache_gib * GIB)
        if self._bound is None:
            free = free_memory(self.target.device)
            if free is None:
                return None
            self._bound = int(free * SHARE)
            logger.info("Rollouts keep at most %.3g GiB of keys and values (max_cache_gib).", self._bound / GIB)
        return self._bound

    def _decode(self, rollout: Rollout) -> None:
        while not rollout.done:
            self.stats.prefill_s += rollout.admit()
            clock = [time.perf_counter()]
            rollout.make_room()
            gamma = self._choose(rollout)
            noise = rollout.noise(gamma + 1)
            clock.append(time.perf_counter())
            guesses = rollout.propose(gamma, noise)
            clock.append(time.perf_counter())
            logits, hidden = rollout.forward(guesses)
            clock.append(time.perf_counter())
            decided = rollout.sample_and_verify(logits, noise, guesses)
            if decided is None:
                guesses = guesses[:, :0]
                logits, hidden = rollout.forward(guesses)
                decided = rollout.sample_and_verify(logits, noise, guesses)
            samples, verdict = decided
            clock.append(time.perf_counter())
            rollout.commit(samples, verdict, hidden)
            if self.recorder is not None:
                self.recorder.step(rollout.rows, rollout.report.emitted, guesses.shape[1])
            step = rollout.finish_step(guesses.shape[1])
            clock.append(time.perf_counter())
            self._account(step, clock)
            if self.progress is not None:
                self.progress(rollout.unfinished, step.emitted)

    def _choose(self, rollout: Rollout) -> int:
        if rollout.drafter is None:
            return 0
        if self.controller is None:
            return self.config.num_speculative_tokens or 0
        gamma = self.controller.choose(rollout.rows.count, rollout.longest)
        if not 0 <= gamma <= self.config.widest:
            raise ValueError(
                f"The controller chose num_speculative_tokens={gamma}; the slots have room for 0 to "
                f"{self.config.widest}: bound it, or raise max_num_speculative_tokens."
            )
        return gamma

    def _account(self, step: StepStats, clock: list[float]) -> None:
        before, step.draft_s, step.verify_s, sampling, after = (b - a for a, b in pairwise(clock))
        step.sample_s = before + sampling
        step.host_s = step.sample_s + after
        self.stats.steps.append(step)
        if self.controller is not None:
            self.controller.observe(step)
