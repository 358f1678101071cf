"""The tokenizer of the reference policies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spec_rollout.tasks.arithmetic import VARIED, Style, problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTEXT = 1024
"""Tokens that the policy can attend to."""
PIECES = r" ?[+*-]?\d{1,2}(?!\d)| ?\w+| ?[^\w\s]+\n?|\s"
"""What the tokenizer may not merge across: signed numbers, words, punctuation with the line end behind it."""
EOS, PAD = "<|endoftext|>", "<|pad|>"


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
