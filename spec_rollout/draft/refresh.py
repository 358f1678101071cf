"""The head follows the policy: a few optimiser steps on the freshest rollouts."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from spec_rollout.draft import ranks
from spec_rollout.draft.eagle import EagleHead
from spec_rollout.draft.features import FeatureBuffer, Sample, hold_out
from spec_rollout.draft.muon import Muon, multiplies_bfloat16
from spec_rollout.draft.objective import divergence, overlap, scores
from spec_rollout.draft.packing import Pack, pack, shuffled
from spec_rollout.draft.policy_view import PolicyView
from spec_rollout.draft.spans import PACK_WIDTH
from spec_rollout.records import RefreshStats

UNROLLED_STEPS, FIRST_UNROLLED_STEPS, DEEPER_AFTER = 5, 3, 50
"""A head unrolled for three steps seldom guesses a fifth token right, one for five steps even a seventh, for a quarter
more time per step; in its first DEEPER_AFTER steps the time is better spent on the first three."""
UNROLLED_SHARE = 4
"""All steps but the first are unrolled from one in so many entries."""
BATCH_TOKENS = 1024
MATRIX_RATE = 0.22
"""Learning rate of the matrices times the root of the hidden size: a step changes any width by the same share. A cold
head learned so, by Muon, from one rollout what took AdamW twice the time."""
SCALE_RATE = 4e-3
"""Of the norms' scales."""
OUTPUT_RATE = 1e-4
"""Of an output head of its own, by AdamW: it is large, and was trained elsewhere."""
WARM_UP_STEPS, FULL_STEPS, SETTLED_STEPS = 3, 25, 278
"""The rates are whole until FULL_STEPS and fall with the root of the steps until SETTLED_STEPS, to 0.3 of that."""
AVERAGE_SPAN, MOST_AVERAGED = 8, 25
"""Decoding with averaged weights raised the acceptance length at 3 guesses by 0.1 after 150 steps."""
MAX_EPOCHS = 8
LOOKS = 4
"""Times that measuring acceptance takes, which a training must have beside one step: half of it may be spent so."""
BURST, FIRST_BURST = 16, 3
"""Steps between two looks at whether training still pays; a new head's first ones tell what a step costs."""

Worth = Callable[[list[float], list[float]], float]
"""Seconds that are saved by going from one list of acceptance rates, by position, to another."""


class DraftTrainer:
    """Trains `head` (float32) towards the target's own distribution: divergence over the draft vocabulary.

    The distribution is recomputed from the kept final hidden states, so nothing of the vocabulary's size is stored.
    Optimiser and random stream are its own; the policy and its stream are not touched. With several ranks each brings
    its own rollouts, the gradients are averaged, and all ranks end with the same head.

    Attributes:
        batch_tokens: tokens of one optimiser step.
        step_seconds: what one took lately; 0 before the first.
        look_seconds: the same of measuring acceptance once.
        average: a head of `head`'s weights averaged over the last steps, which guesses better: the one to decode with.
    """

    def __init__(self, head: EagleHead, view: PolicyView, learning_rate: float | None = None, seed: int = 0):
        self.head, self.view = head, view
        self.average = copy.deepcopy(head).requires_grad_(False)
        rate = learning_rate or MATRIX_RATE * head.config.hidden_size**-0.5
        scales = [p for p in head.parameters() if p.ndim < 2]
        output = [p for name, p in head.named_parameters() if name == "lm_head.weight"]
        matrices = [p for name, p in head.named_parameters() if p.ndim > 1 and name != "lm_head.weight"]
        adamw = [{"params": scales, "lr": SCALE_RATE}, {"params": output, "lr": OUTPUT_RATE}]
        self.optimizers = (Muon(matrices, lr=rate), torch.optim.AdamW(adamw, betas=(0.9, 0.95), weight_decay=0.0))
        self.rates = (rate, SCALE_RATE)
        self.generator = torch.Generator().manual_seed(seed)
        self.steps, self.batch_tokens = 0, BATCH_TOKENS
        self.step_seconds = self.look_seconds = 0.0
        self.device = head.fc.weight.device
        faster = multiplies_bfloat16(self.device.type)  # the draft only loses a little sharpness
        self.precision = torch.autocast(self.device.type, torch.bfloat16, enabled=faster)

    def train(
        self, buffer: FeatureBuffer, seconds: float, worth: Worth | None = None, temperature: float = 1.0
    ) -> RefreshStats:
        """Optimiser steps on the buffer's rollouts, the freshest first, for `seconds` or MAX_EPOCHS passes over them.

        A few of the freshest rollouts are held out, and acceptance at `temperature` is measured on them. Training ends
        early after a burst of steps whose gain there is worth less than the burst took.

        Raises:
            FloatingPointError: the loss is not finite, on any rank.
        """
        began = time.perf_counter()
        stats, losses = RefreshStats(), []
        unseen, seen = hold_out(buffer.samples, self.generator)
        batches = self.batches(seen)
        if ranks.agree(bool(seen) and self._least_seconds <= seconds, self.device):
            stats.acceptance_before = stats.acceptance = self.acceptance(unseen, temperature)
            self.look_seconds = time.perf_counter() - began
            paying = True
            while paying:
                burst_began = time.perf_counter()
                size = BURST if self.steps else FIRST_BURST
                burst = self._burst(batches, size, began + seconds)
                losses += burst
                before, stats.acceptance = stats.acceptance, self.acceptance(unseen, temperature)
                gain = math.inf if worth is None else worth(before, stats.acceptance)
                pays = len(burst) == size and gain > time.perf_counter() - burst_began
                paying = ranks.agree(pays, self.device)
        if losses:
            loss, tokens = torch.stack(losses).unbind(1)
            stats.steps, stats.tokens, stats.loss = len(losses), int(tokens.sum()), loss.mean().item()
        stats.seconds = time.perf_counter() - began
        return stats

    @property
    def _least_seconds(self) -> float:
        """What a training must have to be worth it: one that only looks before and after teaches nothing."""
        return self.step_seconds + LOOKS * self.look_seconds if self.steps else 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next training depends on, the averaged head aside, as tensors."""
        state = {"generator": self.generator.get_state(), "steps": torch.tensor(self.steps)}
        state |= {f"head.{name}": weight for name, weight in self.head.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, values in optimizer.state_dict()["state"].items():
                state |= {f"{number}.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: it is that of another head.
        """
        kept: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        shapes = [[p.shape for group in o.param_groups for p in group["params"]] for o in self.optimizers]
        try:
            self.generator.set_state(state["generator"].cpu())
            self.steps = int(state["steps"])
            weights = {key.removeprefix("head."): state[key] for key in state if key.startswith("head.")}
            self.head.load_state_dict(weights)
            for key in state.keys() - {"generator", "steps", *(f"head.{name}" for name in weights)}:
                number, index, name = key.split(".")
                if state[key].ndim and state[key].shape != shapes[int(number)][int(index)]:
                    raise ValueError(f"{key} has shape {tuple(state[key].shape)}")
                kept[int(number)].setdefault(int(index), {})[name] = state[key]
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"The draft's optimiser state is not this head's ({error!r}): remove its file, and training starts "
                "without."
            ) from error
        for optimizer, values in zip(self.optimizers, kept, strict=True):
            optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})

    def _burst(self, batches: Iterator[Pack], size: int, deadline: float) -> list[Tensor]:
        """At most `size` steps; one starts when the mean of the steps before it still fits. Returns the loss and the
        number of tokens of each, [2]."""
        losses, times = [], [time.perf_counter()]
        while len(losses) < size:
            batch = next(batches, None)
            if not ranks.agree(batch is not None and times[-1] + self.step_seconds <= deadline, self.device):
                break
            losses.append(torch.stack([self.step(batch), batch.learn.sum()]))
            times.append(time.perf_counter())
            first = min(len(losses) - 1, int(self.steps == len(losses)))  # a new head's first step warms up
            self.step_seconds = (times[-1] - times[first]) / (len(losses) - first)
        return losses

    def batches(self, samples: list[Sample]) -> Iterator[Pack]:
        """Packed rows of `batch_tokens` in all; in each pass the newest policy's first, else in random order."""
        for _ in range(MAX_EPOCHS):
            for version in sorted({sample.version for sample in samples}, reverse=True):
                of_version = [sample for sample in samples if sample.version == version]
                for batch in shuffled(of_version, PACK_WIDTH, self.batch_tokens, self.generator):
                    yield Pack(*(x.to(self.device) for x in batch))

    @torch.enable_grad()
    def step(self, batch: Pack) -> Tensor:
        """One optimiser step on `batch`, with gradients averaged over the ranks; returns the mean loss, a scalar.

        Raises:
            FloatingPointError: the loss is not finite, on any rank.
        """
        with self.precision:
            loss = self.loss(batch)
        self.head.zero_grad(set_to_none=True)
        loss.backward()
        loss = ranks.average([p.grad for p in self.head.parameters()], loss.detach())
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"The draft's loss is {loss.item()}.")
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self.steps += 1
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            falling = (FULL_STEPS / min(self.steps, SETTLED_STEPS)) ** 0.5
            optimizer.param_groups[0]["lr"] = rate * min(1.0, self.steps / WARM_UP_STEPS, falling)
            optimizer.step()
        self._accumulate()
        return loss

    @torch.no_grad()
    def _accumulate(self) -> None:
        """A mean over about an eighth of the steps so far, and no more than the last MOST_AVERAGED."""
        share = max(1 / MOST_AVERAGED, AVERAGE_SPAN / (self.steps + 2 * AVERAGE_SPAN))
        for mean, weight in zip(self.average.parameters(), self.head.parameters(), strict=True):
            mean.lerp_(weight, share)

    @property
    def depth(self) -> int:
        """Steps for which the next training step unrolls the head."""
        return FIRST_UNROLLED_STEPS if self.steps < DEEPER_AFTER else UNROLLED_STEPS

    def loss(self, batch: Pack) -> Tensor:
        """The head's `divergence` from the target on `batch`, a scalar."""
        return divergence(scores(self.head, self.view, batch, self.depth, self._starts(batch)))

    def _starts(self, batch: Pack) -> Tensor:
        """Entries [R, P / UNROLLED_SHARE] from which the head is unrolled: some of those that it learns at."""
        chance = torch.rand(batch.learn.shape, generator=self.generator).to(batch.learn.device)
        return (chance * batch.learn).topk(batch.learn.shape[1] // UNROLLED_SHARE).indices

    @torch.no_grad()
    def acceptance(self, samples: list[Sample], temperature: float = 1.0) -> list[float]:
        """Acceptance rate of the first, second … guess on the rollouts of all ranks, by the `overlap` of draft and
        target. Empty without rollouts."""
        sums = torch.zeros(UNROLLED_STEPS, 2, dtype=torch.float64)
        if samples:
            with self.precision:
                packed = Pack(*(x.to(self.device) for x in pack(samples, PACK_WIDTH)))
                for j, step in enumerate(scores(self.average, self.view, packed, UNROLLED_STEPS)):
                    sums[j, 0], sums[j, 1] = overlap(step, temperature), len(step.target)
        sums = ranks.total(sums.to(self.device))
        return (sums[:, 0] / sums[:, 1]).tolist() if sums[:, 1].all() else []
