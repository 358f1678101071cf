"""A character tokenizer, a random policy and a task that a few steps can move: GRPO in about a second."""

from __future__ import annotations

import copy
import os
import string
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spec_rollout.draft.references import OracleDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import RefreshStats, RolloutStats

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
PROMPTS = ["one and two", "a", "count to ten", "the quick brown fox", "b c d", "zero", "hello there", "7 8 9"]


class PeekingBackend:
    """Stands in for the embedded backend: decodes plainly first, so that each of its guesses comes true.

    It draws on torch's random stream as careless drafting would.
    """

    made = 0

    def __init__(self, model, config, tokenizer=None):
        type(self).made += 1
        self.config, self.seeds, self.collected, self.remaining = config, [], [], []
        self.plain = RolloutEngine(model, config, tokenizer=tokenizer)
        self.engine = RolloutEngine(model, config, tokenizer=tokenizer)
        self.draft_version, self.draft_healthy = 0, True

    def generate(self, prompts, params, *, seed, collect=True, max_new_tokens=None):
        self.seeds.append(seed)
        self.collected.append(collect)
        if self.config.num_speculative_tokens:
            torch.rand(7)
            known = self.plain.generate(prompts, params, seed=seed, max_new_tokens=max_new_tokens)
            self.engine.drafter = OracleDrafter(known)
        return self.engine.generate(prompts, params, seed=seed, max_new_tokens=max_new_tokens)

    def refresh(self, *, remaining=None):
        self.remaining.append(remaining)
        if self.config.num_speculative_tokens:
            torch.rand(7)
            self.draft_version += 1
        return RefreshStats(steps=1, tokens=10, loss=0.5, seconds=0.25, draft_version=self.draft_version)

    def take_stats(self):
        stats, self.engine.stats = self.engine.stats, RolloutStats()
        return stats

    def save(self, folder):
        Path(folder).mkdir(parents=True)
        Path(folder, "version").write_text(str(self.draft_version))

    def save_with_policy(self, folder):
        pass

    def load(self, folder):
        self.draft_version = int(Path(folder, "version").read_text())


@pytest.fixture
def peeking(monkeypatch) -> type[PeekingBackend]:
    """Trainers run on the stand-in."""
    monkeypatch.setattr("spec_rollout.training.sampler.EmbeddedBackend", PeekingBackend)
    return PeekingBackend


@pytest.fixture
def eager_head(monkeypatch) -> None:
    """The draft head may train for longer than these short rollouts last."""
    monkeypatch.setattr("spec_rollout.draft.budget.RefreshBudget.seconds", lambda self, *_: 1.0)
    monkeypatch.setattr("spec_rollout.draft.refresh.MAX_EPOCHS", 20)


def build_tokenizer() -> PreTrainedTokenizerFast:
    symbols = ["<pad>", "<eos>", "<unk>", *string.ascii_lowercase, *string.digits, " "]
    characters = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_policy(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def make_policy(tokenizer):
    return lambda: build_policy(tokenizer)


@pytest.fixture(scope="session")
def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS})


class Digits:
    """Rewards digits, and keeps every completion that it has seen."""

    __name__ = "digits"

    def __init__(self):
        self.seen: list[list[list[int]]] = []

    def __call__(self, completion_ids, **kwargs) -> list[float]:
        self.seen.append(copy.deepcopy(completion_ids))
        return [sum(token >= 29 for token in ids) / len(ids) for ids in completion_ids]


OPTIONS = {
    "bf16": False,
    "use_cpu": True,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 12,
    "learning_rate": 1e-2,
    "beta": 0.0,  # a reference policy would have to lie in a folder
    "max_steps": 3,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
"""Of TRL's; `make_trainer` adds a number of guesses."""


@pytest.fixture
def make_trainer(make_policy, tokenizer, prompts, tmp_path):
    """Builds a trainer on the random policy; `OPTIONS` and then `options` fill the configuration."""
    from spec_rollout.config import SpecConfig
    from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer

    def make(trainer_class=SpecGRPOTrainer, config_class=SpecGRPOConfig, *, arguments=None, **options):
        if issubclass(config_class, SpecConfig):
            options = {"num_speculative_tokens": 2, "calibration_cache": str(tmp_path / "calibration")} | options
        args = config_class(str(tmp_path / "run"), **(OPTIONS | options))
        given = {"train_dataset": prompts, "processing_class": tokenizer} | (arguments or {})
        rewards = [Digits(), *given.pop("more_rewards", [])]
        return trainer_class(make_policy(), rewards, args, **given)

    return make


PPO = {
    "num_generations": 1,
    "num_iterations": 2,
    "per_device_train_batch_size": 4,
    "steps_per_generation": 2,
    "max_steps": 8,
    "kl_coef": 0.1,
    "value_learning_rate": 1e-2,
}
"""Two generations of eight completions, each gone through twice in two minibatches."""


@pytest.fixture
def make_ppo(make_trainer, make_policy, tmp_path):
    """Builds a `PPOTrainer` on the random policy, which has a folder for its reference to be loaded from."""
    from spec_rollout.training import PPOConfig, PPOTrainer

    make_policy().save_pretrained(tmp_path / "policy")

    def located(policy, rewards, args, reward_funcs=None, **arguments):
        policy.config._name_or_path = str(tmp_path / "policy")
        return PPOTrainer(policy, reward_funcs or rewards, args, **arguments)

    def make(**options):
        return make_trainer(located, PPOConfig, **(PPO | options))

    return make


@pytest.fixture
def make_talking(tmp_path, peeking):
    """Builds a trainer on a policy that goes through `scripts`."""

    from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer
    from tests.training import talking

    def make(*scripts, gamma=3, classes=(SpecGRPOTrainer, SpecGRPOConfig), reward=True, options=None, **given):
        trainer_class, config_class = classes
        make_policy = given.pop("policy", talking.make_policy)
        tokenizer = talking.make_tokenizer(*scripts)
        own = {"max_completion_length": 300, "num_generations": 8, "max_steps": 1, "num_speculative_tokens": gamma}
        if config_class is SpecGRPOConfig:
            own["max_tool_calling_iterations"] = 3
        args = config_class(str(tmp_path / "run"), **OPTIONS | own | (options or {}))
        reward = talking.Length() if reward is True else reward
        policy = make_policy(tokenizer, *scripts)
        return trainer_class(policy, reward, args, processing_class=tokenizer, **given)

    return make
