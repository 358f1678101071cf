"""What PPO adds to the trainer's state: the value function and the KL coefficient, in checkpoints and optimiser."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from spec_rollout.training.grpo import SpecGRPOTrainer
from spec_rollout.training.ppo.loss import KLController
from spec_rollout.training.ppo.value_head import Critic, ValueHead, set_learning_rate, value_weights

KL_FILE = "kl_controller.json"


class ValueCheckpoints(SpecGRPOTrainer):
    """A GRPO trainer whose checkpoints carry a value function and a KL controller.

    Attributes:
        value_function: attached to the policy.
        kl_controller: of the coefficient that is saved.
    """

    value_function: ValueHead | Critic
    kl_controller: KLController

    def create_optimizer(self, model=None):
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.args.value_learning_rate is not None:
            set_learning_rate(optimizer, self.value_function, self.args.value_learning_rate)
        return optimizer

    def _save(self, output_dir=None, state_dict=None):
        weights = value_weights(self.model.state_dict() if state_dict is None else state_dict)
        super()._save(output_dir, state_dict)
        # Newer transformers call this on every rank (findings/transformers-saves-on-every-rank.sh). Without weights
        # ZeRO-3 keeps them, and the policy's, in shards.
        if weights and self.args.should_save:
            self.value_function.save(output_dir or self.args.output_dir, weights)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            state = json.dumps({"kl_coef": self.kl_controller.coef})
            Path(self._get_output_dir(trial=trial), folder, KL_FILE).write_text(state)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.value_function.restore(resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        if not self.is_deepspeed_enabled:  # which restores the whole model from its own files
            self.value_function.restore(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.kl_controller.coef = json.loads(Path(checkpoint, KL_FILE).read_text())["kl_coef"]
