"""Tools on vLLM: a loop of several turns in the trainer's process and on a server."""

import pytest

from spec_rollout.backends.vllm.colocated import engine_options
from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer
from tests.backends.vllm.tiny import needs_vllm
from tests.training import talking
from tests.training.conftest import OPTIONS
from tests.training.talking import logged
from tests.training.test_tools import CHATS, GOOD, TALK, multiply

pytestmark = needs_vllm
SIZES = {"num_hidden_layers": 4, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("policy"), talking.make_tokenizer(GOOD, TALK)
    talking.make_policy(tokenizer, GOOD, TALK, **SIZES).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(policy, folder, **options) -> SpecGRPOTrainer:
    own = {"max_completion_length": 300, "num_generations": 8, "max_steps": 2, "max_tool_calling_iterations": 2}
    own |= {"num_speculative_tokens": 3, "learning_rate": 1e-3}
    args = SpecGRPOConfig(str(folder), **OPTIONS | own | options)
    reward, tokenizer = talking.Length(), talking.make_tokenizer(GOOD, TALK)
    model = talking.LlamaForCausalLM.from_pretrained(policy)
    trainer = SpecGRPOTrainer(model, reward, args, train_dataset=CHATS, tools=[multiply], processing_class=tokenizer)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def embedded(policy, tmp_path_factory):
    """The embedded engine's run without guesses."""
    return trained(policy, tmp_path_factory.mktemp("plain"), num_speculative_tokens=0)


def check(trainer, embedded) -> None:
    assert trainer.reward_funcs[0].seen == embedded.reward_funcs[0].seen
    answers = [turn["content"] for turns in trainer.reward_funcs[0].turns for turn in turns if turn["role"] == "tool"]
    assert answers and {*answers} == {"12"}
    assert {len(turns) for turns in trainer.reward_funcs[0].turns} == {1, 3, 5}
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-3  # what tools said is left out
    assert max(logged(trainer, "speculative/mean_acceptance_length")) > 1.5
    assert min(logged(trainer, "speculative/draft_healthy")) == 1


def test_in_the_trainers_process(policy, embedded, tmp_path, monkeypatch, eager_head):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    quick = {"enforce_eager": True}
    monkeypatch.setattr("spec_rollout.training.vllm.engine_options", lambda draft: engine_options(draft) | quick)
    check(trained(policy, tmp_path, rollout_backend="vllm", max_slots=8), embedded)
