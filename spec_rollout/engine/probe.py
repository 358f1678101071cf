"""The proof, before a token is sampled, that a policy decodes ragged rows as it reads whole sequences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spec_rollout.engine.compiled import NotCompilableError
from spec_rollout.engine.kv_cache import SlotCache
from spec_rollout.engine.out_of_memory import is_out_of_memory
from spec_rollout.engine.support import REMEDY
from spec_rollout.records import UnsupportedModelError

LENGTH = 24
"""Tokens of each of the three rows, unless the context is shorter or a window of the policy's own wider."""
WINDOW = 5
"""What sliding windows and chunks are narrowed to meanwhile: the code beyond a window runs within a few tokens."""
WINDOWS = ("sliding_window", "attention_chunk_size")
FARTHEST = 512
"""Most tokens of a row, and entries that its attention reads."""
BOUNDS = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Most that logits may be off, in their standard deviations; what is narrower than these gets NARROW."""
NARROW = 0.25
STRIDES = (7, 11, 13)
"""Token ids of one try are multiples of one of these. A mistake shows in each; two experts that a router scores alike
may be taken for one another in one of them."""


class Probe:
    """Rows of a few tokens, read whole by the policy as a trainer reads them, and then decoded raggedly.

    The decoding does what rollouts do: rows of different lengths, guesses that come true and guesses that do not, a
    pass without guesses, a row that moves to another slot, few and many entries to attend to. `stride` picks the ids.
    """

    def __init__(self, target, stride: int):
        self.target = target
        wanted = max(LENGTH, _own_window(target.config) + LENGTH // 2)
        self.length = min(wanted, target.context or FARTHEST, FARTHEST, *target.switches)
        ids = torch.arange(3 * self.length, device=target.device) * stride + stride
        self.ids = (ids % target.vocab_size).view(3, self.length)
        self.extent = min(FARTHEST, target.context or FARTHEST)

    def expected(self) -> Tensor:
        """Logits [3, length, V] of the policy's own forward pass over each row alone."""
        model, size = self.target.model, self.target.vocab_size
        try:
            found = torch.stack([model(input_ids=row[None], use_cache=False).logits[0] for row in self.ids])
        except Exception as cause:  # a trainer would meet it as well
            if is_out_of_memory(cause):
                raise
            attention = self.target.config._attn_implementation
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot read a sequence of {self.length} tokens with its own "
                f"attn_implementation={attention!r}: {type(cause).__name__}: {cause}. Load it with another one, such "
                "as 'sdpa' or 'eager'."
            ) from cause
        if found.shape[-1] != size:
            raise ValueError(
                f"{type(model).__name__} gives {found.shape[-1]} logits where its config.vocab_size is {size}: call "
                f"resize_token_embeddings({found.shape[-1]}), or give it an output head of {size} rows."
            )
        return found

    def error(self, expected: Tensor) -> float:
        """How far the decoded logits are off, in standard deviations of the expected ones; NaN where either is. At the
        worst position; in fewer digits than float32 a router may take other experts, so with experts at the median."""
        finite = expected[expected.isfinite()].float()
        worst = []  # of each position
        for row, positions, logits in self._decoded():
            right = expected[row, positions].to(logits.device)
            apart = torch.where(logits == right, 0.0, (logits.float() - right.float()).abs())  # -inf is -inf
            worst.append(apart.amax(-1))
        scale = finite.std().clamp(min=1e-6) if finite.numel() else torch.tensor(torch.nan)
        positions = torch.cat(worst)
        judged_by_worst = self.target.precision in BOUNDS or not _has_experts(self.target.config)
        off = positions.amax() if judged_by_worst else positions.median()
        return float(off / scale)

    def _decoded(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(row, positions [n], logits [n, V]) of what a rollout would keep."""
        cache, size = SlotCache(), self.length
        cache.allocate(3, self.extent + 1)
        rows, known = [0, 1, 2], [size // 2, size // 3, 0]  # the row in each slot, and its tokens in the cache
        width = max(known)
        places = torch.arange(width, device=self.ids.device).expand(3, -1)
        lengths = torch.tensor(known, device=self.ids.device)
        given = {"lengths": lengths, "first": True}
        self.target.forward(cache, (0, 3), self.ids[:, :width], places, width, keep_logits=1, **given)
        for step in range(size):
            if step == 3:  # the row of the first slot is done, that of the last takes its place
                source, target = torch.tensor([[2], [0]], device=self.ids.device)
                cache.copy(source, target, known[2])
                rows, known = [rows[2], rows[1]], [known[2], known[1]]
            width = 1 if step == 1 else min(4, size - max(known))
            if width <= 0:
                return
            positions = torch.tensor(known, device=self.ids.device)[:, None] + torch.arange(
                width, device=self.ids.device
            )
            right = [1 + (step + slot) % width for slot in range(len(rows))]  # inputs that hold in each slot
            ids = self.ids[rows].gather(1, positions)
            wrong = torch.arange(width, device=ids.device) >= torch.tensor(right, device=ids.device)[:, None]
            ids = torch.where(wrong, (ids + 1) % self.target.vocab_size, ids)
            extent = self.extent if step % 2 else max(known) + width
            logits, _ = self.target.forward(cache, (0, len(rows)), ids, positions, extent)
            cache.commit(torch.tensor(right, device=ids.device))
            for slot, kept in enumerate(right):
                yield rows[slot], positions[slot, :kept], logits[slot, :kept]
                known[slot] += kept


def prove(target, expected: list[Tensor]) -> None:
    """Raise an UnsupportedModelError unless `target` decodes what the policy itself has read, `expected`, one for each
    of STRIDES, within the bound of its precision."""
    name = type(target.model).__name__
    for stride, whole in zip(STRIDES, expected, strict=True):
        try:
            error = Probe(target, stride).error(whole)
        except NotCompilableError:
            raise
        except Exception as cause:  # whatever it trips over, it cannot
            if is_out_of_memory(cause):
                raise
            raise UnsupportedModelError(
                f"{name} cannot decode ragged rows: {type(cause).__name__}: {cause}. {REMEDY}"
            ) from cause
        bound = BOUNDS.get(target.precision, NARROW)
        if error <= bound:
            return
    raise UnsupportedModelError(
        f"{name} does not decode ragged rows as it reads whole sequences: its logits differ by {error:.2g} standard "
        f"deviations (bound {bound}). {REMEDY}"
    )


@contextmanager
def narrow_windows(model: nn.Module) -> Iterator[None]:
    """Windows and chunks of WINDOW tokens wherever `model` keeps wider ones: a few tokens reach beyond them."""
    owners = {id(o): o for m in model.modules() for o in (m, getattr(m, "config", None)) if o is not None}
    for config in list(owners.values()):
        text = getattr(config, "get_text_config", None)
        if text is not None and not isinstance(config, nn.Module):
            owners.setdefault(id(text(decoder=True)), text(decoder=True))
    wide = [(owner, name, owner.__dict__[name]) for owner in owners.values() for name in WINDOWS if _wide(owner, name)]
    try:
        for owner, name, _ in wide:
            setattr(owner, name, WINDOW)
        yield
    finally:
        for owner, name, size in wide:
            setattr(owner, name, size)


def _wide(owner, name: str) -> bool:
    size = owner.__dict__.get(name)
    return isinstance(size, int) and size > WINDOW


def _has_experts(config) -> bool:
    return any("experts" in name and isinstance(size, int) and size > 1 for name, size in config.to_dict().items())


def _own_window(config) -> int:
    """The widest reach that `config` names otherwise than WINDOWS; 0 if there is none within FARTHEST."""
    names = ("window_size", "local_attention", "attention_window")
    sizes = [getattr(config, name, None) for name in names]
    return max([size for size in sizes if isinstance(size, int) and size <= FARTHEST], default=0)
