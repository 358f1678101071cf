"""One rollout in flight: the verbs of the decode loop over its slots."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spec_rollout.engine.guarded_drafter import GuardedDrafter
from spec_rollout.engine.gumbel_max import draw, noise_width
from spec_rollout.engine.rejection import draw_by_rejection, numbers
from spec_rollout.engine.rows import Rows
from spec_rollout.engine.sampling import Sampler
from spec_rollout.engine.scheduler import Admission, Scheduler
from spec_rollout.engine.stops import Stops
from spec_rollout.engine.verify import Verdict, verify
from spec_rollout.records import Completion, Drafter, Request, SamplingParams, StepStats

if TYPE_CHECKING:
    from spec_rollout.engine.engine import RolloutEngine

PREFILL_TOKENS = 4096
"""Most tokens of one prefill pass, padding included, unless a single prompt is longer."""

EXTENT_STEP = 32
"""Attention reads a multiple of this many entries, so that few shapes occur."""

NEAR_TIE = {torch.float32: 2e-4, torch.float64: 1e-10}
"""Two passes of different shape round differently; scores closer than this are decided by the canonical pass. Many
times the rounding of a float32 forward pass, and rare: about one token in 10 000. At a temperature below 1, which
magnifies the rounding, the bound grows with it."""


class Rollout:
    """The slots of one `generate` call. Each verb is one phase of the loop in `RolloutEngine`."""

    def __init__(self, engine: RolloutEngine, requests: list[Request], params: SamplingParams):
        self.target, self.cache, self.stats = engine.target, engine.cache, engine.stats
        self.draft = GuardedDrafter(engine.drafter, engine.stats)
        device = self.target.device
        widest = max(r.max_new_tokens for r in requests)
        longest = max(len(r.prompt) + r.max_new_tokens for r in requests)
        slots = min(engine.config.max_slots, len(requests))
        capacity = _round_up(longest + engine.config.widest + 1, EXTENT_STEP)
        room = slots
        if engine.config.compile_passes:  # one slot alone, or rows read to their end, would be compiled apart
            room, capacity = max(2, slots), capacity + 1
        self.cache.allocate(room, capacity, (self.target.dtype, device))
        self.rows = Rows(room, capacity, self.target.vocab_size, device)
        self.scheduler = Scheduler(requests, slots)
        self.rejection = engine.config.verification == "rejection" and not params.greedy
        self.noise_width = noise_width(self.target.vocab_size)
        self.sampler = Sampler(params, self.rows, numbers(self.target.vocab_size) if self.rejection else None)
        self.invalid = torch.zeros(slots, dtype=torch.bool, device=device)  # rows whose guesses were no token ids
        self.near_tie = NEAR_TIE.get(self.target.precision, 0.0) / min(self.sampler.temperature, 1.0)
        self.stops = Stops(params, engine.tokenizer, device)
        self.eos = set(params.eos_token_ids)
        self.tokens = torch.zeros(len(requests), widest, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(len(requests), widest, device=device)
        self.outcome = torch.zeros(len(requests), 5, dtype=torch.int64, device=device)  # see `_leave`
        self.draft.guard(lambda drafter: drafter.begin(self.rows))

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

    def admit(self) -> float:
        """Fill free slots with waiting requests: each new prompt is prefilled once and copied to its siblings.

        Returns the seconds it took.
        """
        began = time.perf_counter()
        admission = self.scheduler.admit()
        if admission is None:
            return 0.0
        requests = admission.requests
        self.rows.fill(admission.first, requests)
        self.rows.count = len(self.scheduler.active)
        self.sampler.admit(self.rows, admission.first, [r.prompt for r in requests])
        self._prefill(admission)
        if admission.siblings:
            first_sibling = admission.first + len(admission.fresh)
            self._copy(admission.source, list(range(first_sibling, self.rows.count)))
        return time.perf_counter() - began

    def _prefill(self, admission: Admission) -> None:
        """All prompt tokens but the last, which the first verify pass takes."""
        for slots, width in admission.passes(PREFILL_TOKENS):
            place = torch.arange(width, device=self.rows.device).expand(slots[1] - slots[0], -1)
            ids = self.rows.tokens[slots[0] : slots[1], :width]
            _, hidden = self.target.forward(self.cache, slots, ids, place, width, keep_logits=1)
            seen = (self.rows, slots, place[:, 0], hidden)
            self.draft.guard(lambda drafter, seen=seen: drafter.observe(*seen))
        if admission.fresh:
            admitted = (admission.first, admission.first + len(admission.fresh))
            self.draft.guard(lambda drafter: drafter.admit(self.rows, admitted))

    def noise(self, width: int) -> Tensor | None:
        """Gumbel noise [B, width, N] of the next `width` samples of each row; drawn once for draft and target."""
        return self.sampler.noise(self.rows, width)

    def propose(self, gamma: int, noise: Tensor | None) -> Tensor:
        """Guesses [B, γ]; [B, 0] when none are wanted or the drafter broke."""
        noise = None if noise is None else noise[..., : self.noise_width]
        guesses = self.draft.propose(self.rows, gamma, noise, self.sampler.temperature)
        valid = guesses.clamp(0, self.rows.vocab_size - 1)  # an invalid id must not reach the embedding
        self.invalid = (guesses != valid).any(1)
        return valid

    def forward(self, guesses: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits [B, γ + 1, V] and hidden states after the newest token and each guess, in one ragged pass."""
        self.inputs = torch.cat([self.rows.newest(), guesses], 1)
        width = self.inputs.shape[1]
        extent = min(_round_up(self.longest + width, EXTENT_STEP), self.rows.capacity)
        return self.target.forward(self.cache, (0, self.rows.count), self.inputs, self.rows.positions(width), extent)

    def sample_and_verify(self, logits: Tensor, noise: Tensor | None, guesses: Tensor) -> tuple[Tensor, Verdict]:
        """The target's own samples [B, γ + 1], and how much of the guesses came true."""
        seen = self.sampler.seen_along(self.rows, self.inputs)
        z = self.sampler.process(logits, seen)
        noise = None if noise is None else noise[:, : z.shape[1]]
        samples, margin, normaliser = self._draw(z, noise, guesses)
        verdict = self._judge(guesses, samples)
        close = margin < self.near_tie
        close &= torch.arange(close.shape[1], device=close.device) < verdict.emitted[:, None]
        close = close.any(1)
        flags = (close.long(), self.invalid[: self.rows.count].long())
        report = torch.stack([*verdict, *flags]).cpu().numpy()  # the one point where the host waits
        if report[5].any():
            error = ValueError(f"it guessed a token id outside the {self.rows.vocab_size} of the vocabulary")
            self.draft.switch_off(error)
        if report[4].any():
            samples = self._settle(samples, margin, noise, seen, close)
            verdict = self._judge(guesses, samples)
            report = torch.stack(verdict).cpu().numpy()
        self.report = Verdict(*report[:4])
        self.scores = z.gather(-1, samples[..., None])[..., 0].float() - normaliser
        return samples, verdict

    def _draw(self, z: Tensor, noise: Tensor | None, guesses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Samples, the margins by which they won, and logsumexp(z), each [B, γ + 1]."""
        room = self.sampler.room(z)
        if not self.rejection:
            return draw(z, noise, room)
        # Without a proposal the guesses are taken as given: the same law.
        proposal = self.draft.guard(lambda drafter: drafter.proposal()) if guesses.numel() else None
        samples, normaliser = draw_by_rejection(z, noise[..., self.noise_width :], guesses, proposal, room)
        return samples, torch.full_like(normaliser, torch.inf), normaliser  # another γ draws another sample anyway

    def _judge(self, guesses: Tensor, samples: Tensor) -> Verdict:
        rows = self.rows
        rows.tokens[: rows.count].scatter_(1, rows.positions(samples.shape[1]) + 1, samples)
        stops = self.stops.flags(rows, samples)
        return verify(guesses, samples, rows.limit[: rows.count] - rows.progress(), stops)

    def _settle(
        self, samples: Tensor, margin: Tensor, noise: Tensor | None, seen: Tensor | None, concerned: Tensor
    ) -> Tensor:
        """Decide the near-ties of the rows `concerned` [B] by the canonical pass, so that a sample is the same
        whatever the shape of the pass. Rare, hence a loop over them."""
        samples = samples.clone()
        close = (margin < self.near_tie) & concerned[:, None]
        for row, place in close.nonzero().tolist():
            known = self.rows.tokens[row, : self.rows.length[row] + 1]
            ids = torch.cat([known, self.inputs[row, 1 : place + 1]])
            z = self.sampler.process(self.target.canonical(ids), None if seen is None else seen[row, place])
            samples[row, place] = draw(z, None if noise is None else noise[row, place])[0]
            self.stats.near_ties += 1
        return samples

    def commit(self, samples: Tensor, verdict: Verdict, hidden: tuple[Tensor, ...]) -> None:
        """Keep what was emitted: tokens, log-probs, lengths; show the drafter the target's hidden states."""
        rows, count = self.rows, self.rows.count
        start = rows.length[:count].clone()
        rows.logprobs[:count].scatter_(1, rows.positions(samples.shape[1]) + 1, self.scores)
        self.sampler.commit(rows, samples, verdict.emitted)
        rows.length[:count] += verdict.emitted
        rows.steps[:count] += 1
        rows.drafted[:count] += samples.shape[1] - 1
        rows.accepted[:count] += verdict.accepted
        self.rows.lengths[:count] += self.report.emitted
        self.draft.guard(lambda drafter: drafter.observe(rows, (0, count), start, hidden))

    def finish_step(self, verdict: Verdict, gamma: int) -> StepStats:
        """Release the rows that ended and close the gaps they leave."""
        accepted, emitted, ended, full = self.report
        count, context = self.rows.count, self.longest
        finished = np.flatnonzero(ended | full).tolist()
        if finished:
            self._leave(torch.tensor(finished, device=self.rows.device), verdict)
            source, target = self.scheduler.release(finished)
            if source:
                self._copy(source, target, move=True)
            self.rows.count = len(self.scheduler.active)
        reached = (accepted[:, None] > np.arange(gamma)).sum(0).tolist()
        return StepStats(count, gamma, context, int(emitted.sum()), reached)

    def _leave(self, slots: Tensor, verdict: Verdict) -> None:
        rows = self.rows
        self.draft.guard(lambda drafter: drafter.finish(rows, slots))
        request = rows.request[slots]
        place = rows.start[slots, None] + torch.arange(self.tokens.shape[1], device=rows.device)
        place = place.clamp(max=rows.capacity - 1)
        self.tokens[request] = rows.tokens[slots].gather(1, place)
        self.logprobs[request] = rows.logprobs[slots].gather(1, place)
        size = rows.length[slots] + 1 - rows.start[slots]
        counts = (rows.steps[slots], rows.drafted[slots], rows.accepted[slots])
        self.outcome[request] = torch.stack([size, verdict.ended[slots], *counts], 1)

    def _copy(self, source: list[int], target: list[int], move: bool = False) -> None:
        """Copy slots; a sibling takes over keys and values only, a moved row everything."""
        src, dst = (torch.tensor(slots, device=self.rows.device) for slots in (source, target))
        if move:
            self.rows.copy(src, dst)
            self.sampler.copy(src, dst)
        self.cache.copy(src, dst, int(self.rows.lengths[target].max()))
        self.draft.guard(lambda drafter: drafter.copy(self.rows, src, dst))

    def completions(self) -> list[Completion]:
        """The finished completions, in the order of the requests."""
        tokens, logprobs = self.tokens.tolist(), self.logprobs.tolist()
        return [self._completion(*row) for row in zip(tokens, logprobs, self.outcome.tolist(), strict=True)]

    def _completion(self, tokens: list[int], logprobs: list[float], outcome: list[int]) -> Completion:
        size, ended, steps, drafted, accepted = outcome
        reason = "length" if not ended else "eos" if tokens[size - 1] in self.eos else "stop"
        return Completion(tokens[:size], logprobs[:size], reason, steps, drafted, accepted)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
