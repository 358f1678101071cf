"""PPO on speculative rollouts: TRL's GRPO trainer with a value function, and its advantages and loss replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import disable_dropout_in_model, get_config_model_id

from spec_rollout.training.endings import ends_for_trl
from spec_rollout.training.mismatch import log_difference
from spec_rollout.training.ppo.advantages import generalized_advantages, token_rewards, whiten
from spec_rollout.training.ppo.checkpoints import ValueCheckpoints
from spec_rollout.training.ppo.config import PPOConfig
from spec_rollout.training.ppo.loss import KLController, policy_loss, value_loss
from spec_rollout.training.ppo.metrics import rollout_metrics, token_means
from spec_rollout.training.ppo.refusals import refuse_arguments, refuse_launch
from spec_rollout.training.ppo.value_head import (
    TOKENS,
    attach_value_function,
    make_value_function,
    read_completions,
)


class PPOTrainer(ValueCheckpoints):
    """
    Proximal policy optimisation ([Schulman et al. 2017](https://huggingface.co/papers/1707.06347)) with a value
    function, generalised advantages and a KL penalty in the rewards, on speculative rollouts.

    Prompts, chat templates, reward functions and models, tools, evaluation, LoRA and logging are those of
    [`~trl.GRPOTrainer`]; it takes the same arguments.

    Args:
        args ([`PPOConfig`], *optional*):
            Options.
        value_model ([`~transformers.PreTrainedModel`] or `str`, *optional*):
            Critic: a sequence classification model with one label, or the folder or name on the Hub of one (or of a
            causal language model, which then gets a new head). If `None`, `args.value_model`; if that is `None` too, a
            value head on the policy's own trunk.

    Raises:
        ValueError: an option that cannot be honoured, or a critic that does not fit the policy.

    Example:

    ```python
    from datasets import load_dataset
    from spec_rollout.training import PPOConfig, PPOTrainer
    from trl.rewards import accuracy_reward

    trainer = PPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=accuracy_reward,
        args=PPOConfig(output_dir="out"),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```
    """

    _tag_names: ClassVar[list[str]] = ["trl", "ppo", "spec-rollout"]
    _name = "PPO"
    _reads_itself: ClassVar[bool] = True
    _paper: ClassVar[dict[str, str]] = {"title": "Proximal Policy Optimization Algorithms", "id": "1707.06347"}

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs=None,
        args: PPOConfig | None = None,
        *others,
        value_model: str | PreTrainedModel | None = None,
        **options,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = PPOConfig(f"{name.split('/')[-1]}-PPO")
        refuse_arguments(args, value_model, reward_funcs)
        super().__init__(model, reward_funcs, args, *others, **options)
        self._corrects = False  # the ratio is that to the training model's own log-probs of the samples
        value_model = value_model or args.value_model
        refuse_launch(self, critic=value_model is not None)
        function = make_value_function(self.model, value_model, args.trust_remote_code)
        if args.disable_dropout:
            disable_dropout_in_model(function)
        attach_value_function(self.model, function)
        self.value_function = function
        self.kl_controller = KLController(args.kl_coef, args.kl_target, args.kl_horizon)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # [ranks · B, R]
        scores = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        scores[rewards.isnan().all(dim=1)] = torch.nan  # no reward function applies to this completion
        begin = self.accelerator.process_index * len(prompts)
        self._scores = scores[begin : begin + len(prompts)]
        ends = ends_for_trl(self)
        self._open_ended = torch.tensor([ids[-1] not in ends for ids in completion_ids_list], device=scores.device)
        return rewards

    def _generate_and_score_completions(self, inputs):
        with self._scored_here():
            batch = super()._generate_and_score_completions(inputs)
        own = batch["completion_mask"] * batch.get("tool_mask", 1)  # [B, T], 1 at the policy's tokens
        mask = (own * ~self._scores.isnan()[:, None]).to(torch.float32)  # 1 at those that are trained on
        ids, attended = (
            torch.cat([batch[f"prompt_{part}"], batch[f"completion_{part}"]], 1) for part in ("ids", "mask")
        )
        with self.sampler.listening(ids, attended, batch["completion_ids"].shape[1]):
            logprobs, values = self._score_tokens(batch)
        if self.sampler.learns_from_trainer:
            self._finish_phase()
        log_difference(self, batch["sampling_per_token_logps"], logprobs, own)
        reference = batch.pop("ref_per_token_logps", logprobs)
        kl = (logprobs - reference) * mask
        scores = self._scores.nan_to_num()
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * self._open_ended
        rewards = token_rewards(scores, kl, self.kl_controller.coef, mask)
        advantages, returns = generalized_advantages(rewards, values, mask, self.args.gamma, self.args.lam)
        reduce = self._sum_over_ranks
        figures = rollout_metrics(rewards, kl, values, advantages, returns, mask, reduce)
        self._append(figures | {"kl_coef": self.kl_controller.coef})
        self._show(advantages, mask)
        if self.model.training:
            self.kl_controller.update(figures["kl"], self.accelerator.num_processes * len(mask))
        if self.args.whiten_advantages:
            advantages = whiten(advantages, mask, reduce)
        return batch | {
            "advantages": advantages,
            "returns": returns,
            "old_logprobs": logprobs,
            "old_values": values,
            "loss_mask": mask,
            "num_items_in_batch": reduce(mask.sum()),
        }

    @contextmanager
    def _scored_here(self) -> Iterator[None]:
        """TRL scores beforehand samples that are used again, which it tells from `num_iterations`; that is left to the
        pass that reads the values."""
        args, kept = self.args, self.num_iterations
        self.num_iterations = Fraction(args.gradient_accumulation_steps, args.steps_per_generation)
        try:
            yield
        finally:
            self.num_iterations = kept

    @torch.no_grad()
    def _score_tokens(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probs and values [B, T] of the completions under the policy that sampled them."""
        args = self.args
        size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        with disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs):
            rows = zip(*(batch[name].split(size) for name in TOKENS), strict=True)
            read = [self._forward(self.model, dict(zip(TOKENS, part, strict=True))) for part in rows]
        logprobs, _, values, _ = zip(*read, strict=True)
        return torch.cat(logprobs), torch.cat(values)

    def _forward(self, model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        with self.accelerator.autocast():
            return read_completions(model, batch, **router)

    def _compute_loss(self, model, inputs):
        logprobs, entropies, values, aux_loss = self._forward(model, inputs)  # [B, T]
        policy, clipped = policy_loss(
            logprobs, inputs["old_logprobs"], inputs["advantages"], self.epsilon_low, self.epsilon_high
        )
        value, value_clipped = value_loss(values, inputs["old_values"], inputs["returns"], self.args.cliprange_value)
        objective = policy + self.args.vf_coef * value - self.entropy_coef * entropies
        # A token counts the same wherever it is: the sum is divided by what a step's share of the generation would be.
        share = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        accumulated = 1
        if self.model.training:
            accumulated = self.current_gradient_accumulation_steps
            share = share * accumulated / self.args.steps_per_generation
        loss = (objective * inputs["loss_mask"]).sum() / share
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulated
        log_ratio = (logprobs - inputs["old_logprobs"]).detach()
        tokens = {
            "policy_loss": policy,
            "value_loss": value,
            "entropy": entropies,
            "approx_kl": log_ratio.exp() - 1 - log_ratio,
            "clip_fraction": clipped,
            "value_clip_fraction": value_clipped,
        }
        self._append(token_means(tokens, inputs["loss_mask"], self._sum_over_ranks))
        return loss

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, reduction="sum")

    def _append(self, figures: dict[str, float]) -> None:
        """Add to the figures that are logged next."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics.pop("frac_reward_zero_std", None)  # of groups
        for name, figure in figures.items():
            metrics[name].append(figure)

    def _show(self, advantages: Tensor, mask: Tensor) -> None:
        """Put a completion's mean advantage into TRL's table of completions, for the one within its group."""
        means = self.accelerator.gather((advantages * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).tolist()
        column = self._logs["advantages"]
        before = list(column)[: -len(means)]
        column.clear()
        column.extend(before + means)
