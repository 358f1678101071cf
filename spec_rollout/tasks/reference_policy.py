"""A small causal LM trained from nothing on the arithmetic task and saved as an ordinary Hugging Face folder."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from spec_rollout.tasks.arithmetic import FULL_SENTENCES, VARIED, Style, problems
from spec_rollout.tasks.optimization import make_bar, make_optimizer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Size = Literal["demo", "tiny", "small", "base"]

CONTEXT = 1024
"""Tokens that the policy can attend to."""
PIECES = r" ?[+*-]?\d{1,2}(?!\d)| ?\w+| ?[^\w\s]+\n?|\s"
"""What the tokenizer may not merge across: signed numbers, words, punctuation with the line end behind it."""
EOS, PAD = "<|endoftext|>", "<|pad|>"
INITIALIZER_RANGE = 0.06
"""Three times the usual 0.02: at so small a width it learns sooner (a Llama came to a loss of 0.59 against 0.92)."""


@dataclass(frozen=True)
class Recipe:
    """Shape of the model and length of its training; every problem is seen once."""

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    num_problems: int
    batch_size: int
    learning_rate: float
    row: int = 256
    """Tokens of a packed row of training data."""
    style: Style = VARIED


RECIPES: dict[str, Recipe] = {
    "demo": Recipe(4, 128, 2, 384, num_problems=4_800, batch_size=8, learning_rate=0.02, style=FULL_SENTENCES),
    "tiny": Recipe(4, 128, 2, 384, num_problems=8_000, batch_size=8, learning_rate=0.015),
    "small": Recipe(8, 256, 4, 704, num_problems=8_000, batch_size=8, learning_rate=0.012),
    "base": Recipe(12, 640, 10, 1792, num_problems=200_000, batch_size=32, learning_rate=0.006),
}


def make_tokenizer(style: Style = VARIED) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the task, the same one for every seed of a style. A number of one or two
    digits is one token, its sign and leading space included."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((p.prompt + p.solution for p in problems("sft", 2_000, style=style)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A randomly initialised Qwen3 of the recipe's shape; the caller seeds the generator.

    Its norms on queries and keys let attention learn sooner: the loss on held-out problems was 0.20 after 200 steps,
    where a Llama of the same width and depth took 300.
    """
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads // 2,
        head_dim=recipe.hidden_size // recipe.num_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        **special,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, **special)
    return model


def packed_rows(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int) -> Dataset:
    """The recipe's worked problems, packed in order into rows: columns input_ids, labels and position_ids.

    Positions start anew with each problem, by which transformers' attention tells the problems of a row apart; prompts
    carry no label.
    """
    from datasets import Dataset

    rows, row = [], {"input_ids": [], "labels": [], "position_ids": []}
    for problem in problems("sft", recipe.num_problems, seed, recipe.style):
        prompt = tokenizer(problem.prompt)["input_ids"]
        solution = [*tokenizer(problem.solution)["input_ids"], tokenizer.eos_token_id]
        room = recipe.row - len(row["input_ids"])
        row["input_ids"] += (prompt + solution)[:room]
        row["labels"] += ([-100] * len(prompt) + solution)[:room]
        row["position_ids"] += range(len(prompt + solution))[:room]
        if len(row["input_ids"]) == recipe.row:
            rows.append(row)
            row = {name: [] for name in row}
    return Dataset.from_list(rows)


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int, scratch: str) -> None:
    """Supervised training on worked solutions, one pass over the data."""
    import torch
    from transformers import default_data_collator
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from spec_rollout.draft.muon import multiplies_bfloat16

    args = SFTConfig(
        output_dir=scratch,
        seed=seed,
        num_train_epochs=1,
        per_device_train_batch_size=recipe.batch_size,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=20,
        use_cpu=not torch.cuda.is_available(),
        bf16=multiplies_bfloat16("cuda" if torch.cuda.is_available() else "cpu"),
        gradient_checkpointing=False,
        logging_steps=0.05,  # of all steps
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    model.config.use_cache = False  # with a cache, transformers would not look for the problems within a row
    trainer = SFTTrainer(
        model=model,
        args=args,
        data_collator=default_data_collator,
        train_dataset=packed_rows(tokenizer, recipe, seed),
        processing_class=tokenizer,
        optimizers=(make_optimizer(model, recipe.learning_rate), None),
        callbacks=[make_bar()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.config.use_cache = True


def make_reference_policy(out: str | Path, size: Size = "small", seed: int = 0) -> Path:
    """Train a policy and save it as the folder `out`, which appears only when it is complete.

    The same size, seed, machine and number of threads give the same weights.

    Raises:
        ValueError: an unknown size, or something already at `out`.
    """
    from transformers import set_seed

    out = Path(out)
    if size not in RECIPES:
        raise ValueError(f"size={size!r} is unknown: choose one of {', '.join(RECIPES)}.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: remove it or choose another one.")
    out.parent.mkdir(parents=True, exist_ok=True)
    set_seed(seed)
    tokenizer = make_tokenizer(RECIPES[size].style)
    model = make_model(RECIPES[size], tokenizer)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        train(model, tokenizer, RECIPES[size], seed, scratch)
        finished = Path(scratch) / "policy"
        model.save_pretrained(finished)
        tokenizer.save_pretrained(finished)
        finished.replace(out)
    return out
