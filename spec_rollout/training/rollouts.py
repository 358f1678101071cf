"""What the trainers of this package put in the place of TRL's own sampling."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any, ClassVar

from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from spec_rollout.engine.virtual_tokens import virtual_tokens
from spec_rollout.records import Completion
from spec_rollout.training.config import refuse_conflicts, spec_config
from spec_rollout.training.endings import plain
from spec_rollout.training.gathering import refuse_partitioned, refuse_unfit_for_vllm
from spec_rollout.training.mismatch import log_difference
from spec_rollout.training.model_card import append_to_card
from spec_rollout.training.padding import close_gaps
from spec_rollout.training.prompts import REFUSE, SKIP, fit_prompts, skip_overlong
from spec_rollout.training.sampler import TrainerSampler
from spec_rollout.training.sampling_params import log_inherited, trainer_params
from spec_rollout.training.whole_weights import WholeWeights


class SpeculativeRollouts(WholeWeights):
    """Stands before one of TRL's trainers in the bases of a class, which then overrides `_generate_single_turn`.

    Raises:
        ValueError: an option that the sampler cannot honour, or a policy that reads more than text.
    """

    _reads_itself: ClassVar[bool] = False
    """Whether the trainer reads the rollouts in a pass of its own, from which the draft learns, and then ends the
    phase."""

    def __init__(self, model, reward_funcs=None, args=None, *others, **options):
        if args is not None:
            refuse_conflicts(args)
        super().__init__(model, reward_funcs, args, *others, **options)
        if self._is_vlm:
            raise ValueError(
                f"{type(self.model).__name__} comes with a processor for more than text, but speculative rollouts "
                "sample text-only policies: pass its tokenizer as processing_class, or use TRL's own trainer."
            )
        refuse_partitioned(self)
        refuse_unfit_for_vllm(self)
        if virtual_tokens(self.model):
            close_gaps(self.model)
        trainer_params(self)
        log_inherited(self)
        # With tools TRL's loop samples in turns, each of which extends the last one's rows.
        self.sampler = TrainerSampler(spec_config(self.args), turns=bool(getattr(self, "tools", None)))
        self._overlong = getattr(self.args, "overlong_prompts", REFUSE)
        if self._overlong == SKIP:
            skip_overlong(self, super()._tokenize_prompts)
        self._turn = 0
        self._turns: list[tuple[list[list[int]], list[Completion]]] = []
        """What the tool loop has sampled: prompts and completions."""
        self._to_compare: tuple[Any, Tensor | None] | None = None

    def _generate(self, prompts: list):
        self._turn, self._to_compare = 0, None
        # The policy stays gathered through all turns of a tool loop, of which ranks may take unlike numbers.
        own = getattr(self, "rollout_func", None) is None
        with self.sampler.gathered(self) if own else nullcontext():
            output = super()._generate(prompts)
            if not self.sampler.learns_from_trainer:
                self._finish_phase()
        return output

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.sampler.learns_from_trainer and not self._reads_itself:
            self._finish_phase()
        return output

    def _finish_phase(self) -> None:
        if self.model.training:
            self.sampler.refresh(self)
        self.sampler.log(self)

    def _tokenize_prompts(self, prompts: list):
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        return fit_prompts(self, prompt_ids, self._overlong), images, fields

    def _sample_turn(self, prompt_ids, images, multimodal_fields) -> list[Completion]:
        # TRL's tool loop comes back here; near the end of the context it expects a short completion, not an error.
        later_turn, self._turn = self._turn > 0, self._turn + 1
        completions = self.sampler.sample(self, prompt_ids, images, multimodal_fields, clip=later_turn)
        if later_turn:
            self._turns.append((prompt_ids, completions))
        return completions

    def _settle(self) -> None:
        """This rank has no more turns in its tool loop; others that share an engine with it may have."""
        while not getattr(getattr(self.sampler.backend, "engine", None), "finished", True):
            self.sampler.sample(self, [], None, {}, clip=True)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        return super()._calculate_rewards(inputs, prompts, completions, plain(completion_ids_list))

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *others, **options):
        listening = self.sampler.listening(input_ids, attention_mask, logits_to_keep)
        with nullcontext() if self._reads_itself else listening:
            output = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *others, **options
            )
        if self._to_compare is not None:
            (sampled, mask), self._to_compare = self._to_compare, None
            log_difference(self, sampled, output[0], attention_mask[:, -logits_to_keep:] if mask is None else mask)
        return output

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        # Newer transformers call this on every rank: findings/transformers-saves-on-every-rank.sh.
        if self.args.should_save and self.sampler.backend is not None:
            self.sampler.backend.save_with_policy(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        run_folder = self._get_output_dir(trial=trial)
        checkpoint = os.path.join(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self.sampler.save_checkpoint(self, checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.sampler.load(checkpoint)

    def create_model_card(self, *given, **options):
        super().create_model_card(*given, **options)
        if self.is_world_process_zero():
            append_to_card(self)
