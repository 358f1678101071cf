"""Coupled verification inside vLLM: target and draft draw with the request's own noise, and a guess is kept if it is
the target's sample. What is drawn follows from key, position and weights, as in the embedded engine.

It takes the place of two private methods of vLLM's first model runner, which is the one that serves CPUs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spec_rollout.backends.vllm.keyed_batch import KeyedBatch
from spec_rollout.engine.gumbel_max import draw, draw_among
from spec_rollout.engine.near_ties import NEAR_TIE, USUAL

RUNNER = "vllm.v1.worker.cpu_model_runner"
"""The module of the runner that this was tested with."""
NOTHING = -1
"""What vLLM reads as no token."""


class Drawn(NamedTuple):
    """Samples [R] int64; which of them are near-ties [R] bool; the scores z [R, V] that they were drawn from, and
    logsumexp(z) [R]."""

    samples: Tensor
    close: Tensor
    z: Tensor
    normaliser: Tensor


class Coupled:
    """Samples, verifies and guesses for `runner`.

    Attributes:
        near_ties: samples that a pass of another shape might have drawn otherwise; 0 unless vLLM computes in float32
            (in fewer digits there are too many).

    Raises:
        ValueError: another runner than the one that this was tested with, or one that is driven otherwise.
    """

    def __init__(self, runner: Any):
        _refuse_untested(runner)
        self.runner = runner
        self.drafter = getattr(runner, "drafter", None)
        self.near_ties = 0
        self.batch = KeyedBatch(runner.max_num_reqs, runner.device)
        self._bound = NEAR_TIE.get(runner.dtype, 0.0)
        self._vocab_size = 0
        self._next = np.zeros(0, dtype=np.int64)
        """Which completion token each row guesses first, [B]."""
        self._noise: Tensor | None = None
        self._guessed = 0
        """Guesses of each row since it was sampled."""

    def install(self) -> None:
        self.runner._sample = self.sample
        if hasattr(self.drafter, "_sample_draft_tokens"):  # n-grams guess without drawing
            self.drafter._sample_draft_tokens = self.guess

    def remove(self) -> None:
        """Put vLLM's own methods back."""
        for owner, name in ((self.runner, "_sample"), (self.drafter, "_sample_draft_tokens")):
            vars(owner).pop(name, None) if owner is not None else None

    def sample(self, logits: Tensor, metadata: Any) -> Any:
        """vLLM's `_sample`: samples [B, γ + 1] int32, NOTHING behind the first that differs from the guess, and their
        log-probs.

        Args:
            logits: [R, V]; of each row in turn one for each guess and one more.
            metadata: vLLM's record of the guesses; None if there are none.
        """
        from vllm.v1.outputs import SamplerOutput

        runner, given = self.runner, self.runner.input_batch
        rows, self._vocab_size = given.num_reqs, logits.shape[-1]
        self.batch.follow(given.req_ids, runner.requests)
        metadata = metadata if guessed_any(metadata) else None
        guesses = np.array([0] * rows if metadata is None else metadata.num_draft_tokens)
        scheduled = np.diff(runner.query_start_loc.np[: rows + 1])
        first = given.num_computed_tokens_cpu[:rows] + scheduled - guesses - given.num_prompt_tokens[:rows]
        width = int(guesses.max()) + 1
        places = _places(guesses + 1, width)  # of the R samples in a grid [B, γ + 1]
        noise = self.batch.noise(first, width, self._vocab_size)
        lanes = None if noise is None else _listed(noise, places)
        drawn = self._draw(self._constrained(logits, metadata), lanes, guesses + 1)
        grid, close, emitted = _gridded(drawn.samples, places, rows, width), drawn.close, 1
        logprobs, self._guessed = self._logprobs(drawn, grid, places), 0
        if metadata is not None:
            kept = _kept(grid, guesses, metadata.draft_token_ids.long())
            close, emitted = close & _listed(kept, places), kept.sum(1).numpy()
            grid = grid.masked_fill(~kept, NOTHING)
        self._next = first + emitted
        if self._bound:
            self.near_ties += int(close.sum())
        return SamplerOutput(sampled_token_ids=grid.int(), logprobs_tensors=logprobs)

    def guess(self, hidden: Tensor, sampling: Any) -> tuple[Tensor, None]:
        """vLLM's `_sample_draft_tokens`: the next guess [B] int64 of each row, from the draft's `hidden` [B, H]."""
        batch = self.batch
        if batch.all_greedy:
            return self.drafter._greedy_sample(hidden), None
        if self._guessed == 0:  # with that of the sample behind the guesses, which the next pass takes
            self._noise = batch.noise(self._next, self.drafter.num_speculative_tokens + 1, self._vocab_size)
        scores, ids = self._guess_scores(hidden)
        best = scores.argmax(-1) if batch.greedy is not None else None
        scores = scores if batch.temperature is None else scores / batch.temperature
        chosen = draw_among(scores, self._noise[:, self._guessed], ids, self._vocab_size)
        chosen = chosen if best is None else torch.where(batch.greedy, best, chosen)
        self._guessed += 1
        return (chosen if ids is None else ids[chosen]), None

    def _guess_scores(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The draft's scores [B, N] float32, and the tokens [N] that they are of; None is the whole vocabulary."""
        model = self.drafter.model
        offsets = getattr(model, "draft_id_to_target_id", None)
        if offsets is None:
            return model.compute_logits(hidden).float(), None
        # vLLM would write them into a row of the whole vocabulary.
        scores = model.logits_processor(model.lm_head, hidden)[:, : len(offsets)]
        return scores.float(), offsets + torch.arange(len(offsets), device=offsets.device)

    def _constrained(self, logits: Tensor, metadata: Any) -> Tensor:
        """Logits [R, V] after penalties and whatever else vLLM applies before the temperature."""
        if self.batch.plain:
            return logits
        runner, sampling = self.runner, self.runner.input_batch.sampling_metadata
        z = logits.float()
        if metadata is None:
            return runner.sampler.apply_logits_processors(z, sampling, False)
        ours, last = metadata.target_logits_indices.long(), metadata.bonus_logits_indices.long()
        guessed = runner.rejection_sampler.apply_logits_processors(z[ours], sampling, metadata)
        z[last] = runner.sampler.apply_logits_processors(z[last], sampling, True)
        z[ours] = guessed
        return z

    def _draw(self, logits: Tensor, noise: Tensor | None, counts: np.ndarray) -> Drawn:
        """A sample of each of the R logits; row b has counts[b] of them."""
        groups = self.batch.groups
        if len(groups) == 1:
            return self._draw_alike(groups[0][0], logits, noise)
        owner = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
        found = Drawn(
            torch.empty(len(logits), dtype=torch.int64),
            torch.empty(len(logits), dtype=torch.bool),
            torch.empty_like(logits, dtype=torch.float32),
            torch.empty(len(logits)),
        )
        for processor, rows in groups:
            mine = torch.isin(owner, rows)
            drawn = self._draw_alike(processor, logits[mine], None if noise is None else noise[mine])
            for whole, part in zip(found, drawn, strict=True):
                whole[mine] = part.to(whole.dtype)
        return found

    def _draw_alike(self, processor: Any, logits: Tensor, noise: Tensor | None) -> Drawn:
        z = processor.process(logits, None)
        samples, margin, normaliser = draw(z, None if processor.params.greedy else noise)
        size = normaliser.abs().clamp_(min=USUAL / min(processor.temperature, 1.0))
        return Drawn(samples, margin < size.mul_(self._bound / USUAL), z, normaliser)

    def _logprobs(self, drawn: Drawn, grid: Tensor, places: Tensor | None) -> Any:
        """vLLM's table of log-probs, a line for each place of the grid [B, γ + 1], or None if nobody asks."""
        from vllm.v1.outputs import LogprobsTensors

        asked = self.runner.input_batch.sampling_metadata.max_num_logprobs
        if asked is None:
            return None
        z, normaliser, samples = drawn.z, drawn.normaliser[:, None], drawn.samples[:, None]
        if asked:
            table = self.runner.sampler.gather_logprobs(z.float() - normaliser, asked, drawn.samples)
        else:  # in fewer steps than vLLM takes
            score = z.gather(1, samples)
            table = LogprobsTensors(samples.int(), score.float() - normaliser, (z >= score).sum(1))
        if places is None:
            return table
        line = torch.zeros(grid.numel(), dtype=torch.int64)
        line[places] = torch.arange(len(places))
        return LogprobsTensors(*(part[line] for part in table[:3]))


def guessed_any(metadata: Any) -> bool:
    """Whether any row of a step had guesses to verify; from 0.32 on vLLM keeps a record of them in any case."""
    return metadata is not None and metadata.max_spec_len > 0


def _places(counts: np.ndarray, width: int) -> Tensor | None:
    """Where in a grid [B, width], flat, the first `counts` [B] places of each row are; None if that is everywhere."""
    if counts.min() == width:
        return None
    return torch.from_numpy(np.flatnonzero(np.arange(width) < counts[:, None]))


def _listed(grid: Tensor, places: Tensor | None) -> Tensor:
    """What is at `places` [R] of a grid [B, width, ...]: [R, ...]."""
    return grid.flatten(0, 1) if places is None else grid.flatten(0, 1)[places]


def _gridded(values: Tensor, places: Tensor | None, rows: int, width: int) -> Tensor:
    """A grid [B, width] with `values` [R] at `places`, elsewhere what no token is."""
    if places is None:
        return values.view(rows, width)
    return values.new_full((rows * width,), NOTHING).index_put_((places,), values).view(rows, width)


def _kept(grid: Tensor, guesses: np.ndarray, guessed: Tensor) -> Tensor:
    """Which of the samples `grid` [B, γ + 1] are emitted, bool: those behind nothing but true guesses, of which row b
    has guesses[b], one row's behind the other's in `guessed`."""
    rows, width = grid.shape
    kept = torch.ones(rows, width, dtype=torch.bool)
    there = _gridded(guessed, _places(guesses, width - 1), rows, width - 1)
    kept[:, 1:] = (there == grid[:, :-1]).cumprod(1)
    return kept


def _refuse_untested(runner: Any) -> None:
    """
    Raises:
        ValueError: vLLM runs otherwise than this was tested.
    """
    found = type(runner).__module__
    remedy = "set verification='rejection', which is vLLM's own."
    if found != RUNNER:
        raise ValueError(
            f"verification='coupled' was tested with vLLM's runner {RUNNER} (a CPU) only, and this is {found}: "
            f"{remedy}"
        )
    drafter = getattr(runner, "drafter", None)
    for what, there in (
        ("async scheduling", runner.use_async_scheduling),
        ("a draft that guesses all tokens in one pass", getattr(drafter, "parallel_drafting", False)),
        ("a draft with a vocabulary of its own", getattr(drafter, "use_heterogeneous_vocab", False)),
        (f"logprobs_mode={runner.sampler.logprobs_mode}", runner.sampler.logprobs_mode != "processed_logprobs"),
    ):
        if there:
            raise ValueError(f"verification='coupled' does not go with {what} in vLLM: {remedy}")
