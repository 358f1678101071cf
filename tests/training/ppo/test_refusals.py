"""What PPO overrides of its base classes, and what it refuses."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from spec_rollout.training.ppo.refusals import refuse_launch


def test_a_critic_comes_from_a_model_or_a_folder_and_has_to_fit(make_ppo, make_policy, peeking, tmp_path):
    def classifier(labels=1, **options):
        config = make_policy().config
        config.update({"num_labels": labels} | options)
        return AutoModelForSequenceClassification.from_config(config)

    fit = classifier()
    assert make_ppo(arguments={"value_model": fit}).value_function.model is fit
    with pytest.raises(ValueError, match=r"`score` head of 2 labels.*num_labels=1"):
        make_ppo(arguments={"value_model": classifier(2)})
    with pytest.raises(ValueError, match="no `score` head"):
        make_ppo(arguments={"value_model": make_policy()})
    with pytest.raises(ValueError, match="vocabulary of 7 tokens, the policy one of 40"):
        make_ppo(arguments={"value_model": classifier(vocab_size=7, pad_token_id=0, eos_token_id=1)})
    with pytest.raises(ValueError, match=r"given twice.*args.value_model='x'"):
        make_ppo(value_model="x", arguments={"value_model": fit})


def test_what_the_trainer_cannot_be_given(make_trainer, make_ppo, peeking):
    from spec_rollout.training import PPOTrainer, SpecGRPOConfig

    with pytest.raises(ValueError, match="SpecGRPOConfig: PPOTrainer needs a PPOConfig"):
        make_trainer(PPOTrainer, SpecGRPOConfig)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with pytest.raises(ValueError, match=r"optimizers holds an optimiser.*value_learning_rate"):
        make_ppo(arguments={"optimizers": (optimizer, None)})


def test_nothing_of_the_base_classes_is_overridden_by_accident():
    from spec_rollout.training import PPOTrainer, SpecGRPOTrainer

    meant = {
        "__init__", "_calculate_rewards", "_compute_loss", "_generate_and_score_completions", "_load_best_model",
        "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_save", "_save_checkpoint", "create_optimizer",
    }  # fmt: skip
    bases = PPOTrainer.__mro__[: PPOTrainer.__mro__.index(SpecGRPOTrainer)]
    own = {name for base in bases for name, member in vars(base).items() if callable(member)}
    assert {name for name in own if hasattr(SpecGRPOTrainer, name)} == meant
    for name in meant - {"__init__"}:
        ours, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (PPOTrainer, SpecGRPOTrainer))
        assert ours.keys() == theirs.keys()


@pytest.mark.parametrize(
    ("zero3", "fsdp", "critic", "message"),
    [
        (True, False, True, "value_model cannot be partitioned by DeepSpeed ZeRO-3: .*value_model=None"),
        (False, True, False, "cannot be run with FSDP: .*ZeRO"),
        (True, False, False, None),
        (False, False, True, None),
    ],
)
def test_what_cannot_be_sharded_is_refused(zero3, fsdp, critic, message):
    dist = SimpleNamespace(is_zero3=zero3)
    run = SimpleNamespace(_dist=dist, is_fsdp_enabled=fsdp, optimizer=None, model=torch.nn.Linear(1, 1))
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        refuse_launch(run, critic)
