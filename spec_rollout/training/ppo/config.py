"""PPO's options beside those of GRPO and of the sampler; what belongs to GRPO's loss alone is refused."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields

from trl import GRPOConfig

from spec_rollout.training.config import SpecGRPOConfig
from spec_rollout.training.option_types import check_types

REFUSED = {
    "beta": "give kl_coef, the coefficient of the KL penalty in the rewards",
    "loss_type": "PPO has one loss, the clipped surrogate",
    "delta": "the ratio is clipped by epsilon and epsilon_high",
    "importance_sampling_level": "PPO's ratio is that of a token",
    "scale_rewards": "PPO has no groups to scale by; see whiten_advantages",
    "multi_objective_aggregation": "rewards are summed, with reward_weights",
    "top_entropy_quantile": "every token of the policy's own is trained on",
    "off_policy_mask_threshold": "off-policy tokens are clipped, not masked",
    "importance_sampling_correction": "the ratio is that to the training model's own log-probs of the samples",
    "use_bias_correction_kl": "the KL penalty is in the rewards, not in the loss",
    **dict.fromkeys(
        ("use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
        "give a fixed entropy_coef",
    ),
    **dict.fromkeys(
        ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
        "the reference stays the policy that training started from",
    ),
    **{
        option.name: "it belongs to another loss"
        for option in fields(GRPOConfig)
        if option.name.startswith(("sapo_", "vespo_"))
    },
}
"""Options of SpecGRPOConfig that mean nothing here, with what to do instead."""


@dataclass
class PPOConfig(SpecGRPOConfig):
    r"""
    Configuration class for the [`PPOTrainer`].

    Every parameter of [`~trl.GRPOConfig`] that is not about GRPO's loss, and every one of [`SpecConfig`], is a flat
    key here too: `epsilon` and `epsilon_high` clip the ratio, `num_iterations` counts the epochs over a generation,
    `steps_per_generation` its minibatches, `entropy_coef` weighs the entropy bonus.

    Parameters:
        num_generations (`int`, *optional*, defaults to `1`):
            Completions per prompt. PPO needs no groups.
        num_iterations (`int`, *optional*, defaults to `4`):
            Epochs over the completions of one generation.

        > Parameters that control the value function

        value_model (`str`, *optional*):
            Critic to train beside the policy. If `None`, a value head on the policy's own trunk.
        value_learning_rate (`float`, *optional*):
            Learning rate of the value function. If `None`, `learning_rate`.
        vf_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the value loss.
        cliprange_value (`float`, *optional*, defaults to `0.2`):
            How far a value may move in one generation before its loss is clipped. If `None`, any distance.

        > Parameters that control rewards and advantages

        gamma (`float`, *optional*, defaults to `1.0`):
            Discount per token.
        lam (`float`, *optional*, defaults to `0.95`):
            λ of generalised advantage estimation.
        whiten_advantages (`bool`, *optional*, defaults to `True`):
            Whether to scale the advantages of a generation to mean 0 and variance 1 over its tokens, on all ranks.
        missing_eos_penalty (`float`, *optional*):
            Subtracted from the score of a completion that did not come to an end. If `None`, nothing is.

        > Parameters that control the KL penalty

        kl_coef (`float`, *optional*, defaults to `0.05`):
            Coefficient of the per-token KL penalty to the reference; the initial one where it adapts. With `0.0` there
            is no reference model.
        kl_target (`float`, *optional*):
            KL per completion, in nats, that the coefficient adapts to keep. If `None`, it is fixed.
        kl_horizon (`int`, *optional*, defaults to `10000`):
            Completions over which the coefficient adapts.

    Raises:
        ValueError: a value out of its range, or an option that belongs to GRPO or to another sampler.
    """

    num_generations: int | None = field(
        default=1, metadata={"help": "Completions per prompt. PPO needs no groups, so 1 will do."}
    )
    num_iterations: int = field(
        default=4, metadata={"help": "Epochs over the completions of one generation (called μ in GRPO)."}
    )

    # Parameters that control the value function
    value_model: str | None = field(
        default=None,
        metadata={
            "help": "Critic to train beside the policy: a folder or name on the Hub of a sequence classification "
            "model with one label (such as a reward model), or of a causal language model. `None` puts a value head "
            "on the policy's own trunk."
        },
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the value function. `None` is `learning_rate`."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float | None = field(
        default=0.2,
        metadata={
            "help": "How far a value may move in one generation before its loss is clipped. `None` does not clip."
        },
    )

    # Parameters that control rewards and advantages
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    whiten_advantages: bool = field(
        default=True,
        metadata={
            "help": "Scale the advantages of a generation to mean 0 and variance 1 over its tokens, on all ranks."
        },
    )
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={
            "help": "Subtracted from the score of a completion that did not come to an end within "
            "`max_completion_length`."
        },
    )

    # Parameters that control the KL penalty
    kl_coef: float = field(
        default=0.05,
        metadata={
            "help": "Coefficient of the per-token KL penalty to the reference, in the rewards; the initial one where "
            "it adapts. `0.0` does without a reference model."
        },
    )
    kl_target: float | None = field(
        default=None,
        metadata={
            "help": "KL to the reference per completion, in nats, that the coefficient adapts to keep (Ziegler et al. "
            "2019). `None` keeps the coefficient fixed."
        },
    )
    kl_horizon: int = field(
        default=10_000, metadata={"help": "Completions over which the coefficient of the KL penalty adapts."}
    )

    def __post_init__(self):
        check_types(self)
        given = self.num_generations, self.num_generations_eval
        self._pass_as_groups()
        super().__post_init__()
        self.num_generations, self.num_generations_eval = given
        self._refuse_options_of_grpo()
        self._check_ranges()
        self.beta = self.kl_coef  # by which GRPOTrainer decides whether to load a reference

    def _pass_as_groups(self) -> None:
        """Let the completions of a generation pass as one group: GRPOConfig asks for groups of two or more."""
        if self.num_generations is None or self.num_generations < 1:
            raise ValueError(f"num_generations={self.num_generations} is out of range: it must be at least 1.")
        if self.num_generations > 1:
            return
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        together = self.generation_batch_size or self.per_device_train_batch_size * steps
        self.num_generations = together if together > 1 else int(os.environ.get("WORLD_SIZE", "1"))
        self.num_generations_eval = self.num_generations_eval or 1
        if self.num_generations < 2:
            raise ValueError(
                "A generation of 1 completion is too small to whiten advantages over: raise "
                "per_device_train_batch_size, gradient_accumulation_steps or steps_per_generation."
            )

    def _refuse_options_of_grpo(self) -> None:
        for option in fields(SpecGRPOConfig):
            if option.name not in REFUSED:
                continue
            value = getattr(self, option.name)
            own = option.name == "beta" and value == self.kl_coef  # a copy of a configuration that was checked
            if value != option.default and not own:
                raise ValueError(f"{option.name}={value!r} is an option of GRPO, not of PPO: {REFUSED[option.name]}.")

    def _check_ranges(self) -> None:
        target, rate, near = self.kl_target, self.value_learning_rate, self.cliprange_value
        bounds = (
            ("num_iterations", self.num_iterations >= 1, "at least 1"),
            ("epsilon", 0 < self.epsilon < 1, "in (0, 1)"),
            ("epsilon_high", self.epsilon_high is None or self.epsilon_high > 0, "above 0, or None for epsilon"),
            ("value_learning_rate", rate is None or rate > 0, "above 0, or None for learning_rate"),
            ("vf_coef", self.vf_coef > 0, "above 0: the advantages need a value function that learns"),
            ("cliprange_value", near is None or near > 0, "above 0, or None for no clipping"),
            ("gamma", 0 < self.gamma <= 1, "in (0, 1]"),
            ("lam", 0 <= self.lam <= 1, "in [0, 1]"),
            ("missing_eos_penalty", (self.missing_eos_penalty or 0) >= 0, "0 or more, or None; it is subtracted"),
            ("kl_coef", self.kl_coef >= 0, "0 or more"),
            ("kl_target", target is None or target > 0, "above 0, or None for a fixed kl_coef"),
            (
                "kl_horizon",
                self.kl_horizon >= self.generation_batch_size,
                f"at least generation_batch_size={self.generation_batch_size}",
            ),
        )
        for name, holds, bound in bounds:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} is out of range: it must be {bound}.")
        if target is not None and self.kl_coef == 0:
            raise ValueError(
                f"kl_target={target} cannot be kept with kl_coef=0.0, which is multiplied and so stays 0: give an "
                "initial kl_coef above 0."
            )
        if self.missing_eos_penalty is not None and self.mask_truncated_completions:
            raise ValueError(
                f"missing_eos_penalty={self.missing_eos_penalty} and mask_truncated_completions=True exclude each "
                "other: one trains on cut-off completions, the other leaves them out."
            )
