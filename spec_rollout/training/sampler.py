"""The sampler that a TRL trainer calls: one object behind both the trainer classes and the rollout function."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from trl.extras.profiling import profiling_context

from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.backends.trace import FOLDER, HEAD, MODEL, NGRAMS, TraceRecorder
from spec_rollout.backends.vllm.backend import VLLMBackend
from spec_rollout.config import SpecConfig
from spec_rollout.gamma import GammaController
from spec_rollout.records import Completion, RefreshStats
from spec_rollout.training.gathering import gathered_policy, own_random_stream, whole_for_draft
from spec_rollout.training.metrics import local_sums, metrics
from spec_rollout.training.progress import rollout_bar
from spec_rollout.training.prompts import context_of, within_context
from spec_rollout.training.sampling_params import trainer_params

DRAFT_FOLDER = "draft"
TEXT_FIELDS = ("token_type_ids", "mm_token_type_ids")


class TrainerSampler:
    """Draws a trainer's completions, lets the draft learn from them, and logs both.

    The backend is made at the first generation, from the unwrapped policy. The noise of the embedded one depends on
    the trainer's seed, rank, step, and on how many generation calls that step has made before: not on torch's random
    streams, which are left as they were found. With `turns` the prompts of a call may extend rows of those before it
    within the same `gathered`, where these are kept for it.
    """

    def __init__(self, config: SpecConfig, turns: bool = False):
        self.config, self.turns = config, turns
        self.backend: EmbeddedBackend | VLLMBackend | None = None
        self._policy: nn.Module | None = None
        """While it is gathered."""
        self._draft_folder: Path | None = None
        self._calls: dict[str, tuple[int, int]] = {}
        self._seconds = 0.0
        self._refreshed = RefreshStats()
        self._unheard = False
        """Whether the trainer has yet to read the last rollouts."""

    @property
    def learns_from_trainer(self) -> bool:
        """Whether the draft learns from the trainer's pass over the rollouts instead of from the rollouts."""
        return self.config.rollout_backend == "vllm"

    @contextmanager
    def gathered(self, trainer: Trainer) -> Iterator[nn.Module]:
        """The unwrapped policy; with all its weights, unless vLLM samples. Entered again inside, it is the same one
        and costs nothing."""
        if self._policy is not None or self.learns_from_trainer:
            yield self._policy or trainer.accelerator.unwrap_model(trainer.model_wrapped)
            return
        with gathered_policy(trainer) as policy:
            self._policy = policy
            try:
                yield policy
            finally:
                self._policy = None
                if self.backend is not None:
                    self.backend.engine.forget()

    def _readable(self, trainer: Trainer) -> AbstractContextManager:
        """Within it the draft can read what it needs of the policy."""
        return whole_for_draft(trainer) if self.learns_from_trainer else self.gathered(trainer)

    def sample(
        self, trainer: Trainer, prompts: Sequence[Sequence[int]], images: Any, fields: dict, *, clip: bool = False
    ) -> list[Completion]:
        """One completion per prompt entry, in order.

        Args:
            images, fields: what TRL's tokenization found besides text; they are refused.
            clip: let a prompt that is near the end of the context have fewer new tokens, instead of refusing it.
        """
        refuse_multimodal(images, fields)
        params = trainer_params(trainer)
        began = time.perf_counter()
        with self.gathered(trainer) as policy, own_random_stream(trainer):
            if self.backend is None:
                self._make_backend(policy, trainer)
            seed = self._seed(trainer)
            if self.config.profile_rollouts:
                self._record(trainer, seed)
            if self.learns_from_trainer:
                self.backend.policy_version = trainer.state.global_step
                self._unheard = trainer.model.training
            shown = self.config.rollout_backend == "embedded" and trainer.is_world_process_zero()
            shown = shown and not trainer.args.disable_tqdm
            with profiling_context(trainer, "spec_rollout.generate"), rollout_bar(self.backend, len(prompts), shown):
                completions = self.backend.generate(
                    prompts,
                    params,
                    seed=seed,
                    max_new_tokens=within_context(prompts, params, context_of(trainer)) if clip else None,
                    collect=trainer.model.training,
                )
        self._seconds += time.perf_counter() - began
        return completions

    @contextmanager
    def listening(self, ids: Tensor, mask: Tensor, width: int) -> Iterator[None]:
        """Within it the policy reads `ids` [N, T], whose last `width` columns are completions, with `mask` [N, T]; the
        first time after a generation phase the draft learns from that pass, if that is where it learns."""
        if not self._unheard or self.backend is None:
            yield
            return
        self._unheard = False
        with self.backend.listen(ids, mask, mask[:, :-width].sum(1).tolist()):
            yield

    def refresh(self, trainer: Trainer) -> None:
        """Let the draft learn from the rollouts since the last call."""
        if self.backend is None:
            return
        with self.gathered(trainer), own_random_stream(trainer), profiling_context(trainer, "spec_rollout.refresh"):
            self._refreshed = self.backend.refresh(remaining=_remaining(trainer))
        if self.config.profile_rollouts:
            recorder = self.backend.engine.recorder
            recorder.refresh(self._refreshed)
            sources = {HEAD: self.backend.head, NGRAMS: self.backend.ngrams, MODEL: self.backend.model}
            for name, source in sources.items():
                if isinstance(source.controller, GammaController):
                    recorder.cost(source.controller.cost, name)

    def log(self, trainer: Trainer) -> None:
        """Append the figures of the rollouts since the last call to the trainer's metrics; every rank takes part."""
        if self.backend is None:
            return
        version, healthy = self.backend.draft_version, self.backend.draft_healthy
        place = trainer.accelerator.process_index, trainer.accelerator.num_processes
        sums = local_sums(self.backend.take_stats(), self._refreshed, self._seconds, version, healthy, *place)
        self._refreshed, self._seconds = RefreshStats(), 0.0
        vector = torch.tensor(list(sums.values()), dtype=torch.float32, device=trainer.accelerator.device)
        total = trainer.accelerator.reduce(vector, reduction="sum").tolist()
        for name, value in metrics(dict(zip(sums, total, strict=True))).items():
            trainer._metrics[_mode(trainer)][name].append(value)

    def save_checkpoint(self, trainer: Trainer, checkpoint: str | Path) -> None:
        """Save beside a trainer's checkpoint; every rank takes part, those that should save write."""
        with self._readable(trainer):
            if trainer.args.should_save:
                self.save(checkpoint)

    def save(self, checkpoint: str | Path) -> None:
        """Write the draft into the folder of a trainer's checkpoint; it appears there only when it is complete."""
        folder, scratch = Path(checkpoint, DRAFT_FOLDER), Path(checkpoint, f".{DRAFT_FOLDER}")
        shutil.rmtree(scratch, ignore_errors=True)
        if self.backend is not None:
            self.backend.save(scratch)
        elif self._draft_folder is not None:
            shutil.copytree(self._draft_folder, scratch)
        if scratch.exists():
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(scratch, folder)

    def load(self, checkpoint: str | Path) -> None:
        """Take up the draft of a trainer's checkpoint, now or when the backend is made."""
        folder = Path(checkpoint, DRAFT_FOLDER)
        if not folder.is_dir():
            if self.config.num_speculative_tokens != 0:
                warnings.warn(f"{checkpoint} holds no draft: it starts as in a new run.", stacklevel=2)
            return
        self._draft_folder = folder
        if self.backend is not None:
            self.backend.load(folder)

    def _make_backend(self, policy: nn.Module, trainer: Trainer) -> None:
        if self.config.rollout_backend == "vllm":
            from spec_rollout.training.vllm import engine_starter

            backend: EmbeddedBackend | VLLMBackend = VLLMBackend(
                policy, self.config, engine_starter(trainer, self.config), whole=lambda: whole_for_draft(trainer)
            )
            backend.tokenizer = trainer._tokenizer
        else:
            backend = EmbeddedBackend(policy, self.config, trainer._tokenizer)
            if self.turns:
                backend.engine.keep_rows()
        if self._draft_folder is not None:
            backend.load(self._draft_folder)
        self.backend = backend

    def _record(self, trainer: Trainer, seed: tuple[int, ...]) -> None:
        """Have the next rollout recorded; a run that starts anew begins a new file."""
        _, _, rank, step, call = seed
        if self.backend.engine.recorder is None:
            folder, ranks = Path(trainer.args.output_dir, FOLDER), trainer.accelerator.num_processes
            if step == 0:
                for old in folder.glob("rank-*.jsonl"):  # those of more ranks too, each removed by one
                    if int(old.stem.split("-")[1]) % ranks == rank:
                        old.unlink()
            self.backend.engine.recorder = TraceRecorder(self.config.max_slots, folder / f"rank-{rank}.jsonl")
        self.backend.engine.recorder.labels = {"mode": _mode(trainer), "step": step, "call": call}

    def _seed(self, trainer: Trainer) -> tuple[int, ...]:
        """Five numbers that no other generation call of the run shares, and that a resumed run finds again."""
        mode, step = _mode(trainer), trainer.state.global_step
        last_step, calls = self._calls.get(mode, (step, 0))
        call = calls if last_step == step else 0
        self._calls[mode] = (step, call + 1)
        return (trainer.args.seed, int(mode == "train"), trainer.accelerator.process_index, step, call)


def refuse_multimodal(images: Any, fields: dict) -> None:
    """Refuse everything but text.

    Raises:
        ValueError: naming what was found.
    """
    foreign = sorted(name for name, rows in fields.items() if name not in TEXT_FIELDS or any(map(any, rows)))
    if images is not None or foreign:
        found = ["images"] * (images is not None) + foreign
        raise ValueError(
            f"The prompts carry {', '.join(found)}, but speculative rollouts sample text-only policies: remove them "
            "from the dataset, or use TRL's own trainer."
        )


def _mode(trainer: Trainer) -> str:
    return "train" if trainer.model.training else "eval"


def _remaining(trainer: Trainer) -> int | None:
    """Generation phases that the run has still to come; None where it has no fixed length."""
    state, args = trainer.state, trainer.args
    if state.max_steps <= 0:
        return None
    passes = (state.max_steps - state.global_step) * args.gradient_accumulation_steps
    return max(0, -(-passes // (args.steps_per_generation * args.num_iterations)) - 1)
