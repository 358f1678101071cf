"""TRL's configurations with the sampler's options beside them as flat keys."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields

from transformers import GenerationConfig, TrainingArguments
from trl import GRPOConfig, RLOOConfig

from spec_rollout.backends.vllm.engine import require_vllm
from spec_rollout.config import SpecConfig
from spec_rollout.training.option_types import check_types
from spec_rollout.training.prompts import OVERLONG, REFUSE
from spec_rollout.training.sampling_params import check_option_types, sampling_params


@dataclass
class PromptOptions:
    """What the trainers, not the sampler, do with prompts."""

    overlong_prompts: str = field(
        default=REFUSE,
        metadata={
            "help": "What happens to a prompt that leaves no room for `max_completion_length` in the policy's "
            "context: `refuse` ends the run with its size, `clip` keeps its last tokens, `skip` leaves it out of the "
            "datasets before training.",
            "choices": OVERLONG,
        },
    )


@dataclass
class SpecGRPOConfig(PromptOptions, SpecConfig, GRPOConfig):
    r"""
    Configuration class for the [`SpecGRPOTrainer`].

    Every parameter of [`~trl.GRPOConfig`] and of [`SpecConfig`] is a flat key, on the command line and in YAML.

    Parameters:
        > Parameters that control speculative rollouts

        num_speculative_tokens (`int`, *optional*):
            Tokens that the draft guesses per step. If `None`, adapted to the batch size; `0` is plain decoding.
        importance_sampling_correction (`bool`, *optional*, defaults to `False`):
            Whether to correct for the difference between the sampler's and the trainer's log-probs, as TRL does for
            vLLM.
        overlong_prompts (`str`, *optional*, defaults to `"refuse"`):
            What happens to a prompt that is too long for the policy's context: `"refuse"`, `"clip"` or `"skip"`.

        The others are described beside the fields of [`SpecConfig`]; `--help` prints them all.

    Raises:
        ValueError: a value out of its range, or an option of TRL that another sampler would have to serve.
    """

    importance_sampling_correction: bool = field(
        default=False,
        metadata={
            "help": "Whether to correct for the difference between the sampler's and the trainer's log-probs, as TRL "
            "does for vLLM: with its `vllm_importance_sampling_mode`, `_clip_min` and `_clip_max`. Costs one more "
            "forward pass over the samples."
        },
    )

    def __post_init__(self):
        check_types(self)
        GRPOConfig.__post_init__(self)
        SpecConfig.__post_init__(self)
        refuse_conflicts(self)
        samples_elsewhere = self.rollout_backend == "vllm" and self.vllm_importance_sampling_correction
        if self.importance_sampling_correction or samples_elsewhere:
            _refuse_uncorrectable(self)


@dataclass
class SpecRLOOConfig(PromptOptions, SpecConfig, RLOOConfig):
    r"""
    Configuration class for the [`SpecRLOOTrainer`].

    Every parameter of [`~trl.RLOOConfig`] and of [`SpecConfig`] is a flat key, on the command line and in YAML.

    Parameters:
        > Parameters that control speculative rollouts

        num_speculative_tokens (`int`, *optional*):
            Tokens that the draft guesses per step. If `None`, adapted to the batch size; `0` is plain decoding.
        overlong_prompts (`str`, *optional*, defaults to `"refuse"`):
            What happens to a prompt that is too long for the policy's context: `"refuse"`, `"clip"` or `"skip"`.

        The others are described beside the fields of [`SpecConfig`]; `--help` prints them all.

    Raises:
        ValueError: a value out of its range, or an option of TRL that another sampler would have to serve.
    """

    def __post_init__(self):
        check_types(self)
        RLOOConfig.__post_init__(self)
        SpecConfig.__post_init__(self)
        refuse_conflicts(self)


def spec_config(args: TrainingArguments) -> SpecConfig:
    """The sampler's options in `args`; the defaults where `args` is a configuration of TRL's own."""
    if not isinstance(args, SpecConfig):
        return SpecConfig()
    return SpecConfig(**{option.name: getattr(args, option.name) for option in fields(SpecConfig)})


def refuse_conflicts(args: GRPOConfig | RLOOConfig) -> None:
    """Refuse what the trainer would have to leave to another sampler, before a model is loaded.

    Raises:
        ValueError: naming the option and the remedy.
    """
    check_types(args)
    if getattr(args, "overlong_prompts", REFUSE) not in OVERLONG:
        raise ValueError(f"overlong_prompts={args.overlong_prompts!r} is unknown: give one of {', '.join(OVERLONG)}.")
    for name in ("use_vllm", "use_transformers_continuous_batching"):
        if getattr(args, name):
            raise ValueError(
                f"{name}=True cannot be combined with speculative rollouts: set {name}=False, and for vLLM "
                "rollout_backend='vllm', or use TRL's own trainer and configuration."
            )
    _refuse_strangers(args)
    if getattr(args, "rollout_backend", "embedded") == "vllm":
        _refuse_unserved_by_vllm(args)
    if args.max_completion_length is None:
        raise ValueError(
            "max_completion_length=None leaves completions unbounded: give a number of tokens, at least 1."
        )
    if args.temperature <= 0:
        raise ValueError(
            f"temperature={args.temperature} is out of range: a group needs completions that differ, and the loss "
            "divides by it, so it must be above 0."
        )
    if args.generation_kwargs:
        _refuse_generation_kwargs(args)


def _refuse_generation_kwargs(args: GRPOConfig | RLOOConfig) -> None:
    own = {"max_new_tokens": args.max_completion_length, "do_sample": True, "temperature": args.temperature}
    check_option_types(args.generation_kwargs)
    params = sampling_params(GenerationConfig(**{**own, **args.generation_kwargs}))
    if params.temperature != args.temperature:
        drawn = "greedily" if params.greedy else f"at temperature {params.temperature}"
        raise ValueError(
            f"generation_kwargs={args.generation_kwargs} would draw {drawn}, but a group needs completions that "
            f"differ, and the loss divides by temperature={args.temperature}: leave temperature and do_sample out of "
            "it, and give temperature, above 0, as an option of its own."
        )


def _refuse_strangers(args: GRPOConfig | RLOOConfig) -> None:
    """Refuse processes that were started together but would train apart, as Accelerate leaves them without a GPU."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and args.world_size == 1:
        raise ValueError(
            f"WORLD_SIZE={started} processes were started, but no accelerator was found to join them on, so each "
            "would train a policy of its own: set use_cpu=True (--use_cpu), or start one process."
        )


def _refuse_unserved_by_vllm(args: GRPOConfig | RLOOConfig) -> None:
    if args.vllm_mode == "colocate":
        require_vllm()
    drafts = args.num_speculative_tokens != 0
    learns = drafts and args.draft_refresh
    for name, value, served, remedy in (
        (
            "vllm_tensor_parallel_size",
            args.vllm_tensor_parallel_size,
            1,
            "set it to 1 and vllm_mode to 'server', and start `spec-rollout serve` with --tensor_parallel_size",
        ),
        ("vllm_structured_outputs_regex", args.vllm_structured_outputs_regex, None, "leave it out"),
        ("calibration_cache", args.calibration_cache, None, "vLLM is measured anew in each run; leave it out"),
        (
            "min_p",
            args.min_p or None if drafts and args.verification == "rejection" else None,
            None,
            "vLLM refuses it beside guesses that it judges by rejection sampling; leave out one of the two",
        ),
        (
            "vllm_importance_sampling_correction",
            getattr(args, "vllm_importance_sampling_correction", True) or not learns,
            True,
            "the draft learns from the pass that it takes; set it to True, or draft_refresh to False",
        ),
    ):
        if value != served:
            raise ValueError(f"{name}={value!r} cannot be honoured with rollout_backend='vllm': {remedy}.")


def _refuse_uncorrectable(args: GRPOConfig) -> None:
    if not args.vllm_importance_sampling_correction:
        raise ValueError(
            "importance_sampling_correction=True contradicts vllm_importance_sampling_correction=False: give one of "
            "them up."
        )
    if args.loss_type == "vespo" and not args.vllm_importance_sampling_mode.startswith("token_"):
        raise ValueError(
            f"vllm_importance_sampling_mode={args.vllm_importance_sampling_mode!r} cannot correct loss_type='vespo': "
            "set it to 'token_truncate' or 'token_mask'."
        )
