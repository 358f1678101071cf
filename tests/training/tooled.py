"""A trainer whose policy calls a tool, sized for vLLM."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaForCausalLM

from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer
from tests.training import talking
from tests.training.test_tools import CHATS, GOOD, TALK, multiply

OPTIONS = {
    "max_completion_length": 300,
    "num_generations": 8,
    "max_steps": 2,
    "max_tool_calling_iterations": 2,
    "num_speculative_tokens": 2,
    "learning_rate": 1e-3,
}


def save_policy(folder: Path) -> Path:
    """Calls `multiply` or does not, evenly."""
    tokenizer = talking.make_tokenizer(GOOD, TALK)
    sizes = {"num_hidden_layers": 4, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    talking.make_policy(tokenizer, GOOD, TALK, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_trainer(policy: str | Path, args: SpecGRPOConfig) -> SpecGRPOTrainer:
    given = {"train_dataset": CHATS, "tools": [multiply], "processing_class": talking.make_tokenizer(GOOD, TALK)}
    return SpecGRPOTrainer(LlamaForCausalLM.from_pretrained(policy), talking.Length(), args, **given)
