"""One rollout in flight: the verbs of the decode loop over its slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spec_rollout.config import SpecConfig
from spec_rollout.engine.guarded_drafter import GuardedDrafter
from spec_rollout.engine.gumbel_max import draw, noise_width
from spec_rollout.engine.kept_rows import KeptRows
from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.engine.near_ties import NearTies
from spec_rollout.engine.precision import broken_policy
from spec_rollout.engine.protocols import Drafter
from spec_rollout.engine.rejection import draw_by_rejection, numbers
from spec_rollout.engine.results import Results
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.sampling import Sampler
from spec_rollout.engine.scheduler import Scheduler
from spec_rollout.engine.seats import Seats
from spec_rollout.engine.stops import Stops
from spec_rollout.engine.target import Target
from spec_rollout.engine.transfers import upload
from spec_rollout.engine.verify import Verdict, verify
from spec_rollout.records import Request, RolloutStats, SamplingParams, StepStats


class Rollout:
    """The slots of one `generate` call. Each verb is one phase of the loop in `RolloutEngine`."""

    def __init__(
        self,
        requests: list[Request],
        params: SamplingParams,
        *,
        target: Target,
        cache: SlotCache,
        stats: RolloutStats,
        config: SpecConfig,
        drafter: Drafter | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        bound: int | None = None,
        kept: KeptRows | None = None,
    ):
        self.target, self.cache = target, cache
        self.draft = GuardedDrafter(drafter, stats)
        slots = min(config.max_slots, len(requests))
        target.confine(max(len(r.prompt) + r.max_new_tokens for r in requests))
        if kept is not None:
            kept.open(target.state)
        self.rows = Rows(slots, 0, target.vocab_size, target.device)
        self.scheduler = Scheduler(requests, slots, keeps_prompts=not target.recurrent)
        self.rejection = config.verification == "rejection" and not params.greedy
        self.noise_width = noise_width(target.vocab_size)
        self.sampler = Sampler(params, self.rows, numbers(target.vocab_size) if self.rejection else None)
        self.near_ties = NearTies(target, self.sampler, stats)
        self.stops = Stops(params, tokenizer, target.device)
        self.results = Results(len(requests), params.eos_token_ids)
        self.passes, self.inputs = 0, torch.zeros(0, 1, dtype=torch.int64, device=target.device)
        self.soiled = np.zeros(0, dtype=bool)  # rows whose guesses led to NaN, which must not stay in the cache
        self.invalid = torch.zeros(slots, dtype=torch.bool, device=target.device)  # rows with guesses that are no ids
        self.distrusted = self.invalid  # and those with guesses that were not drawn from their proposal
        self.draft.call("begin", self.rows)
        self.seats = Seats(
            self.scheduler,
            config,
            bound,
            rows=self.rows,
            cache=cache,
            sampler=self.sampler,
            target=target,
            draft=self.draft,
            stats=stats,
            kept=kept,
        )

    @property
    def drafter(self) -> Drafter | None:
        """None once it broke."""
        return self.draft.drafter

    @property
    def done(self) -> bool:
        return self.scheduler.done

    @property
    def unfinished(self) -> int:
        """Requests that wait or are active."""
        return len(self.scheduler.waiting) + len(self.scheduler.active)

    @property
    def longest(self) -> int:
        """Committed tokens of the longest active row."""
        return int(self.rows.lengths[: self.rows.count].max())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of what is there, or was about to be, by the option that lowers them most."""
        seats, rows = self.seats, self.rows
        logits = rows.count * self.inputs.shape[1] * rows.vocab_size * (self.target.dtype.itemsize + 4)
        slots = "max_cache_gib" if seats.slots > 1 else "max_completion_length"
        return {slots: seats.bytes, "max_slots": logits}

    def admit(self) -> float:
        """Fill free slots with waiting requests: each new prompt is prefilled once and copied to its siblings.

        Returns the seconds it took.
        """
        return self.seats.admit()

    def make_room(self) -> None:
        """Let slots grow, where rows could outgrow them in this step, or the youngest rows wait."""
        self.seats.make_room()

    def noise(self, width: int) -> Tensor | None:
        """Gumbel noise [B, width, N] of the next `width` samples of each row; drawn once for draft and target."""
        return self.sampler.noise(self.rows, width)

    def propose(self, gamma: int, noise: Tensor | None) -> Tensor:
        """Guesses [B, γ]; [B, 0] when none are wanted or the drafter broke."""
        noise = None if noise is None else noise[..., : self.noise_width]
        guesses = self.draft.propose(self.rows, gamma, noise, self.sampler.temperature)
        valid = guesses.clamp(0, self.rows.vocab_size - 1)  # an invalid id must not reach the embedding
        self.invalid = (guesses != valid).any(1)
        self.distrusted = self.invalid
        return valid

    def forward(self, guesses: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Logits [B, γ + 1, V] and hidden states after the newest token and each guess, in one ragged pass."""
        self.inputs = torch.cat([self.rows.newest(), guesses], 1)
        extent = self.cache.extent(self.longest + self.inputs.shape[1])
        if self.inputs.numel() > 1 or not self.target.reads_pairs:
            return self._forward(self.inputs, extent)
        logits, hidden = self._forward(self.inputs.expand(1, 2), extent)
        return logits[:, :1], tuple(states[:, :1] for states in hidden)

    def _forward(self, inputs: Tensor, extent: int) -> tuple[Tensor, Sequence[Tensor]]:
        places = self.rows.positions(inputs.shape[1])
        return self.target.forward(self.cache, (0, self.rows.count), inputs, places, extent)

    def sample_and_verify(
        self, logits: Tensor, noise: Tensor | None, guesses: Tensor
    ) -> tuple[Tensor, Verdict] | None:
        """The target's own samples [B, γ + 1], and how much of the guesses came true. None if the logits of a pass
        with guesses are NaN: a guess may be the cause, so `forward` must read the rows again without.

        Raises:
            FloatingPointError: they are NaN without guesses, or infinite.
        """
        self.passes += 1
        seen = self.sampler.seen_along(self.rows, self.inputs)
        z = self.sampler.scale(logits, seen)
        kept = self.sampler.filter(z)
        noise = None if noise is None else noise[:, : z.shape[1]]
        samples, close, normaliser = self._draw(z, kept, noise, guesses)
        self.scores = kept.gather(-1, samples[..., None])[..., 0].float() - normaliser
        verdict = self._judge(guesses, samples)
        emits = torch.arange(samples.shape[1], device=samples.device) < verdict.emitted[:, None]
        broken = ~normaliser.isfinite()
        active = slice(0, self.rows.count)
        flags = [(close & emits).any(1), self.invalid[active], self.distrusted[active]]
        flags += [broken.any(1), (broken & emits).any(1)]
        report = torch.stack([*verdict, *(flag.long() for flag in flags)]).cpu().numpy()  # the host waits here alone
        settles, invalid, distrusted, self.soiled, fatal = report[4:].astype(bool)
        if fatal.any():
            if not guesses.shape[1]:
                raise self._broken_policy(int(fatal.argmax()))
            self.cache.clear_beyond(self.rows.length[active])
            return None
        if invalid.any():
            error = ValueError(f"it guessed a token id outside the {self.rows.vocab_size} of the vocabulary")
            self.draft.switch_off(error)
        elif distrusted.any():
            self.draft.switch_off(ValueError("its proposal is NaN, out of order, or does not hold what it guessed"))
        if settles.any():
            settled = close & upload(settles, close.device)[:, None]
            self.near_ties.settle(self.rows, self.inputs, samples, self.scores, noise, seen, settled)
            verdict = self._judge(guesses, samples)
            report = torch.stack(verdict).cpu().numpy()
        self.report = Verdict(*report[:4])
        return samples, verdict

    def _draw(self, z: Tensor, kept: Tensor, noise: Tensor | None, guesses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Samples of softmax(kept), whether they are near-ties, and logsumexp(kept), each [B, γ + 1]."""
        room = self.sampler.room(kept)
        if not self.rejection:
            samples, margin, normaliser = draw(kept, noise, room)
            return samples, self.near_ties.close(z, kept, noise, samples, margin), normaliser
        # Without a proposal the guesses are taken as given: the same law.
        invalid = self.invalid[: self.rows.count]
        proposal = self.draft.proposal(guesses, invalid, self.rows.vocab_size) if guesses.numel() else None
        noise = noise[..., self.noise_width :]
        samples, normaliser, distrusted = draw_by_rejection(kept, noise, guesses, proposal, room)
        self.distrusted = invalid | distrusted
        return samples, torch.zeros_like(samples, dtype=torch.bool), normaliser  # another γ draws another one anyway

    def _broken_policy(self, slot: int) -> FloatingPointError:
        rows = self.rows
        done = int(rows.lengths[slot] + 1 - rows.starts[slot])
        return broken_policy(
            self.target.model,
            f"in decoding step {self.passes}, after {done} tokens of prompt {self.scheduler.active[slot].index}",
        )

    def _judge(self, guesses: Tensor, samples: Tensor) -> Verdict:
        rows = self.rows
        rows.tokens[: rows.count].scatter_(1, rows.positions(samples.shape[1]) + 1, samples)
        stops = self.stops.flags(rows, samples)
        return verify(guesses, samples, rows.limit[: rows.count] - rows.progress(), stops)

    def commit(self, samples: Tensor, verdict: Verdict, hidden: Sequence[Tensor]) -> None:
        """Keep what was emitted: tokens, log-probs, lengths; show the drafter the target's hidden states."""
        rows, count = self.rows, self.rows.count
        start = rows.length[:count].clone()
        rows.logprobs[:count].scatter_(1, rows.positions(samples.shape[1]) + 1, self.scores)
        self.cache.commit(verdict.emitted)
        self.sampler.commit(rows, samples, verdict.emitted)
        rows.length[:count] += verdict.emitted
        rows.steps[:count] += 1
        rows.drafted[:count] += samples.shape[1] - 1
        rows.accepted[:count] += verdict.accepted
        self.rows.lengths[:count] += self.report.emitted
        if self.soiled.any():
            self.cache.clear_beyond(rows.length[:count])
        self.draft.call("observe", rows, (0, count), start, hidden, news=samples.shape[1])

    def finish_step(self, gamma: int) -> StepStats:
        """Release the rows that ended and close the gaps they leave."""
        accepted, emitted, ended, full = self.report
        count, context = self.rows.count, self.longest
        finished = np.flatnonzero(ended | full)
        if finished.size:
            indices = [self.scheduler.active[slot].index for slot in finished]
            slots = self.results.take(self.rows, finished, indices, ended[finished])
            self.draft.call("finish", self.rows, slots)
            self.seats.leave(finished, indices)
        reached = (accepted[:, None] > np.arange(gamma)).sum(0).tolist()
        return StepStats(count, gamma, context, int(emitted.sum()), reached)
