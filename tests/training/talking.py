"""A policy that calls tools: what comes next depends on the last token alone, by a table that is written out here."""

from __future__ import annotations

import importlib.resources
import re
import string

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

START, END = "assistant\n", "<|im_end|>"
SPECIAL = ("<|endoftext|>", "<|im_start|>", END)


def make_tokenizer(*scripts: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Each piece of `scripts` is one token, longer words elsewhere are unknown; Qwen's chat template."""
    pieces = sorted({piece for script in scripts for piece in script} - {END} | {START}, key=len, reverse=True)
    symbols = [*SPECIAL, "<unk>", *pieces, *(c for c in string.printable if c not in pieces)]
    words = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<unk>"))
    pattern = Regex("|".join([*map(re.escape, pieces), r"\w+|\W"]))
    words.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    words.decoder = decoders.Fuse()
    words.add_special_tokens([AddedToken(symbol, special=True, normalized=False) for symbol in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=SPECIAL[0], eos_token=END, unk_token="<unk>", padding_side="left"
    )
    template = importlib.resources.files("trl") / "chat_templates" / "qwen2_5.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def make_policy(tokenizer: PreTrainedTokenizerFast, *scripts: tuple[str, ...], **sizes: int) -> LlamaForCausalLM:
    """Goes through one of `scripts` after each start of its turn, and picks evenly where they part."""
    sizes = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 2} | sizes
    policy = seeded(LlamaForCausalLM, LlamaConfig(**shape(tokenizer), **sizes))
    with torch.no_grad():
        for layer in policy.model.layers:  # the residual stream keeps the embedding, one entry per token
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return follow(policy, tokenizer, scripts)


def make_hybrid(tokenizer: PreTrainedTokenizerFast, *scripts: tuple[str, ...]) -> Qwen3_5ForCausalLM:
    """The same with recurrent layers that have a say: what was read before makes one way likelier than another."""
    delta_rule = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    delta_rule |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    config = Qwen3_5TextConfig(
        **shape(tokenizer),
        **delta_rule,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.1,
    )
    policy = seeded(Qwen3_5ForCausalLM, config)
    with torch.no_grad():
        for layer in policy.model.layers:
            layer.mlp.down_proj.weight.zero_()
            if hasattr(layer, "linear_attn"):
                layer.linear_attn.A_log.fill_(-3.0)  # it forgets slowly
                layer.linear_attn.out_proj.weight.mul_(0.2)
            else:
                layer.self_attn.o_proj.weight.zero_()
    return follow(policy, tokenizer, scripts)


def shape(tokenizer: PreTrainedTokenizerFast) -> dict:
    """What both configurations have in common."""
    size = len(tokenizer)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    sizes = {"vocab_size": size, "hidden_size": size + size % 2, "intermediate_size": 16}
    return {**sizes, "max_position_embeddings": 2048, "tie_word_embeddings": False, **ends}


def seeded(kind, config):
    torch.manual_seed(0)
    return kind(config)


@torch.no_grad()
def follow(policy, tokenizer: PreTrainedTokenizerFast, scripts):
    """`policy` with embeddings, one entry per token, and output rows that go the ways of `scripts`."""
    size, hidden = len(tokenizer), policy.config.hidden_size
    policy.model.embed_tokens.weight.copy_(torch.eye(size, hidden))
    policy.lm_head.weight.copy_(table(tokenizer, scripts, hidden).T / hidden**0.5)
    return policy


def table(tokenizer: PreTrainedTokenizerFast, scripts, hidden: int) -> torch.Tensor:
    """Logits [hidden, V] of what follows each token: 20 above the rest where a script goes that way."""
    ids = tokenizer.convert_tokens_to_ids
    logits = torch.zeros(hidden, len(tokenizer))
    for script in scripts:
        for before, after in zip((START, *script), (*script, END), strict=True):
            logits[ids(before), ids(after)] = 20.0
    return logits


class Length:
    """Rewards long completions, and keeps them all."""

    __name__ = "length"

    def __init__(self):
        self.seen: list[list[list[int]]] = []
        self.turns: list[list[dict]] = []

    def __call__(self, completion_ids, completions, **given) -> list[float]:
        self.seen.append([list(ids) for ids in completion_ids])
        self.turns.extend(completions)
        return [float(len(ids)) for ids in completion_ids]


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
