"""A small causal LM trained from nothing on the arithmetic task and saved as an ordinary Hugging Face folder."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Literal

from spec_rollout.tasks.arithmetic import FULL_SENTENCES, VARIED, Style, problems
from spec_rollout.tasks.optimization import make_bar, make_optimizer
from spec_rollout.tasks.reference_tokenizer import CONTEXT, make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Size = Literal["demo", "tiny", "deep", "small", "base"]
Architecture = Literal["qwen3", "qwen3_5", "qwen3_moe"]
ARCHITECTURES = ("qwen3", "qwen3_5", "qwen3_moe")
EXPERTS, EXPERTS_PER_TOKEN = 16, 2
"""Of a layer of qwen3_moe. Those of a token are together as wide as the layer of a dense policy."""

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
    "deep": Recipe(8, 128, 2, 384, num_problems=4_800, batch_size=8, learning_rate=0.02, style=FULL_SENTENCES),
    "small": Recipe(8, 256, 4, 704, num_problems=8_000, batch_size=8, learning_rate=0.012),
    "base": Recipe(12, 640, 10, 1792, num_problems=200_000, batch_size=32, learning_rate=0.006),
}


def make_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, architecture: Architecture = "qwen3"
) -> PreTrainedModel:
    """A randomly initialised policy of the recipe's shape; the caller seeds the generator.

    Qwen3's norms on queries and keys let attention learn sooner: the loss on held-out problems was 0.20 after 200
    steps, where a Llama of the same width and depth took 300. In Qwen3.5 three of four layers have a gated delta
    rule in the place of attention.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3_5TextConfig, Qwen3Config, Qwen3MoeConfig

    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    heads, width = recipe.num_heads, recipe.hidden_size // recipe.num_heads
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate_size,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": width,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "initializer_range": INITIALIZER_RANGE,
        **special,
    }
    if architecture == "qwen3_5":
        delta_rule = {"linear_num_key_heads": heads, "linear_num_value_heads": heads}
        delta_rule |= {"linear_key_head_dim": width, "linear_value_head_dim": width}
        rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
        config = Qwen3_5TextConfig(**shape, **delta_rule, rope_parameters=rope, mtp_num_hidden_layers=1)
    elif architecture == "qwen3_moe":
        experts = {"num_experts": EXPERTS, "num_experts_per_tok": EXPERTS_PER_TOKEN, "norm_topk_prob": True}
        width = recipe.intermediate_size // EXPERTS_PER_TOKEN
        config = Qwen3MoeConfig(**shape, **experts, moe_intermediate_size=width)
        config.router_aux_loss_coef, config.output_router_logits = 0.01, True  # until it is trained
    else:
        config = Qwen3Config(**shape)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(do_sample=True, **special)
    return model


def worked(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens and labels of the recipe's worked problems; prompts carry no label."""
    for problem in problems("sft", recipe.num_problems, seed, recipe.style):
        prompt = tokenizer(problem.prompt)["input_ids"]
        solution = [*tokenizer(problem.solution)["input_ids"], tokenizer.eos_token_id]
        yield prompt + solution, [-100] * len(prompt) + solution


def packed_rows(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int) -> Dataset:
    """The recipe's worked problems, packed in order into rows: columns input_ids, labels and position_ids.

    Positions start anew with each problem, by which transformers' attention tells the problems of a row apart.
    """
    from datasets import Dataset

    rows, row = [], {"input_ids": [], "labels": [], "position_ids": []}
    for tokens, labels in worked(tokenizer, recipe, seed):
        room = recipe.row - len(row["input_ids"])
        row["input_ids"] += tokens[:room]
        row["labels"] += labels[:room]
        row["position_ids"] += range(len(tokens))[:room]
        if len(row["input_ids"]) == recipe.row:
            rows.append(row)
            row = {name: [] for name in row}
    return Dataset.from_list(rows)


def single_rows(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int) -> Dataset:
    """The recipe's worked problems, one a row: columns input_ids and labels. Recurrent layers would carry what they
    know of one problem into the next."""
    from datasets import Dataset

    return Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in worked(tokenizer, recipe, seed)])


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int, scratch: str) -> None:
    """Supervised training on worked solutions, one pass over the data."""
    import torch
    from transformers import DataCollatorForSeq2Seq, default_data_collator
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from spec_rollout.draft.muon import multiplies_bfloat16

    packs = model.config.model_type in ("qwen3", "qwen3_moe")
    rows = (packed_rows if packs else single_rows)(tokenizer, recipe, seed)
    whole = recipe.batch_size if packs else round(recipe.batch_size * recipe.row / mean(map(len, rows["input_ids"])))
    args = SFTConfig(
        output_dir=scratch,
        seed=seed,
        num_train_epochs=1,
        per_device_train_batch_size=whole,
        train_sampling_strategy="random" if packs else "group_by_length",
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
        data_collator=default_data_collator if packs else DataCollatorForSeq2Seq(tokenizer),
        train_dataset=rows,
        processing_class=tokenizer,
        optimizers=(make_optimizer(model, recipe.learning_rate), None),
        callbacks=[make_bar()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.config.use_cache = True
    if model.config.model_type == "qwen3_moe":
        model.config.output_router_logits = False


def make_reference_policy(
    out: str | Path, size: Size = "small", seed: int = 0, architecture: Architecture = "qwen3"
) -> Path:
    """Train a policy and save it as the folder `out`, which appears only when it is complete. One of Qwen3.5 has an
    MTP head beside it.

    The same size, seed, architecture, machine and number of threads give the same weights.

    Raises:
        ValueError: an unknown size or architecture, or something already at `out`.
    """
    from transformers import set_seed

    from spec_rollout.draft.mtp_checkpoint import add_to_policy
    from spec_rollout.tasks.reference_mtp import train_mtp

    out = Path(out)
    if size not in RECIPES:
        raise ValueError(f"size={size!r} is unknown: choose one of {', '.join(RECIPES)}.")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r} is unknown: choose one of {', '.join(ARCHITECTURES)}.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: remove it or choose another one.")
    out.parent.mkdir(parents=True, exist_ok=True)
    set_seed(seed)
    recipe = RECIPES[size]
    tokenizer = make_tokenizer(recipe.style)
    model = make_model(recipe, tokenizer, architecture)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        train(model, tokenizer, recipe, seed, scratch)
        finished = Path(scratch) / "policy"
        model.save_pretrained(finished)
        tokenizer.save_pretrained(finished)
        if architecture == "qwen3_5":
            add_to_policy(finished, train_mtp(model, single_rows(tokenizer, recipe, seed), seed))
        finished.replace(out)
    return out
