"""An agent that learns to call a tool: TRL runs the tool and comes back for the next turn, every turn is speculative.

python examples/agent_with_tool.py
"""

import random

from datasets import Dataset

from spec_rollout import SpecGRPOConfig, SpecGRPOTrainer


def multiply(a: int, b: int) -> int:
    """
    Multiplies two numbers.

    Args:
        a: The first.
        b: The second.

    Returns:
        Their product.
    """
    return a * b


def questions(count: int = 512, seed: int = 0) -> Dataset:
    """Products too large for the head of a small model."""
    numbers = random.Random(seed)
    pairs = [(numbers.randint(100, 999), numbers.randint(100, 999)) for _ in range(count)]
    asked = [[{"role": "user", "content": f"What is {a} times {b}? Use the tool."}] for a, b in pairs]
    return Dataset.from_dict({"prompt": asked, "answer": [a * b for a, b in pairs]})


def right_answer(completions, answer, **columns):
    """1 if the last message holds the product, 0.5 if the tool was called at least."""
    rewards = []
    for messages, product in zip(completions, answer, strict=True):
        called = any(message["role"] == "tool" for message in messages)
        right = str(product) in str(messages[-1].get("content", ""))
        rewards.append(1.0 if right else 0.5 * called)
    return rewards


def main():
    trainer = SpecGRPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=right_answer,
        args=SpecGRPOConfig(output_dir="out", max_completion_length=256, max_tool_calling_iterations=2),
        train_dataset=questions(),
        tools=[multiply],
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
