"""Tiny random policies, and the plain decoding that every rollout is compared with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from spec_rollout.engine.noise import gumbel, request_keys
from spec_rollout.records import Completion, SamplingParams
from tests.tiny_configs import ARCHITECTURES, HYBRIDS, RELATIVES, SIZES, VOCAB

transformers.logging.set_verbosity_error()

DEVICE = torch.device("cpu")
"""Where policies are made: the option --device."""
PROMPTS = [[1, 2, 3], [1, 2, 3], [5], [*range(7, 19)], [5], [3, 3], [1, 2, 3]]
"""Ragged, with siblings, prompts of one token, and one that is longer than the sliding windows."""


def make_policy(name: str, dtype: torch.dtype = torch.float32, std: float = 0.35, **overrides) -> PreTrainedModel:
    """A random model of architecture `name` whose next-token distributions are peaked and depend on the context."""
    options = {**SIZES, **ARCHITECTURES.get(name, {}), **HYBRIDS.get(name, RELATIVES.get(name, {})), **overrides}
    config = AutoConfig.for_model(name, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=std)
        for key, parameter in model.named_parameters():  # states that last, unlike those of a fresh model
            if key.endswith(("A_log", "dt_bias")):
                torch.nn.init.uniform_(parameter, -3, -1)
    return model.to(DEVICE, dtype).eval()


policy = cache(make_policy)
"""The same, shared between tests that leave it as it is."""


def unprobed(target, configs: list, own: list[str]) -> list[str]:
    """In the place of `Target._probe`, where a test breaks what the probe would notice."""
    target.precision = torch.float32
    return own


class Scripted:
    """A controller that goes through `gammas` again and again."""

    def __init__(self, *gammas: int):
        self.gammas = itertools.cycle(gammas)
        self.steps = []

    def choose(self, batch_size: int, context: int) -> int:
        return next(self.gammas)

    def observe(self, stats) -> None:
        self.steps.append(stats)


def processed(model: PreTrainedModel, params: SamplingParams, known: Sequence[int], logits: torch.Tensor):
    """Logits [V] after the tokens `known`, processed by the objects that `model.generate` would use."""
    options = {"do_sample": not params.greedy, "repetition_penalty": params.repetition_penalty}
    if not params.greedy:
        options |= {
            "temperature": float(params.temperature),
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": params.min_p or None,
        }
    processors = model._get_logits_processor(GenerationConfig(**options), input_ids_seq_length=len(known))
    return processors(torch.tensor([known], device=logits.device), logits.float()[None])[0]


def gumbel_max(z: torch.Tensor, key: tuple[int, int], position: int) -> tuple[int, list, list[list]]:
    """The sample of softmax(z) [V] by the noise of (key, position); scores of the blocks, and of each block's tokens.

    Blocks are of ⌈√V⌉ tokens. A block scores the logsumexp of its z plus a number of its own, a token its z plus a
    number of its place in the block.
    """
    size = math.ceil(math.sqrt(len(z)))
    parts = z.split(size)
    noise = gumbel(torch.tensor([key], dtype=torch.int32), torch.tensor([[position]]), len(parts) + size)[0, 0]
    blocks = [float(part.logsumexp(0) + noise[i]) for i, part in enumerate(parts)]
    tokens = [(part + noise[len(parts) :][: len(part)]).tolist() for part in parts]
    best = blocks.index(max(blocks))
    return best * size + tokens[best].index(max(tokens[best])), blocks, tokens


@torch.no_grad()
def reference(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    seed: Sequence[int] = (0,),
    max_new_tokens: Sequence[int] | None = None,
) -> list[Completion]:
    """The completions as the design defines them: one token, one whole forward pass at a time.

    token = `gumbel_max` of processed logits and the noise of (request key, position); knows EOS and length, not stop
    strings. Rows share passes, padded on the right, where no causal model looks.
    """
    limits = max_new_tokens or [params.max_new_tokens] * len(prompts)
    keys = request_keys(seed, len(prompts))
    completions = [Completion([], [], "length") for _ in prompts]
    while left := [
        i for i, c in enumerate(completions) if c.finish_reason == "length" and len(c.token_ids) < limits[i]
    ]:
        known = [[*prompts[i], *completions[i].token_ids] for i in left]
        rows = [torch.tensor(row, device=DEVICE) for row in known]
        logits = model(pad_sequence(rows, batch_first=True), use_cache=False).logits
        for i, row, scores in zip(left, known, logits, strict=True):
            done = completions[i]
            z = processed(model, params, row, scores[len(row) - 1])
            token = int(z.argmax()) if params.greedy else gumbel_max(z, keys[i], len(done.token_ids))[0]
            done.token_ids.append(token)
            done.logprobs.append(float(z.log_softmax(-1)[token]))
            if token in params.eos_token_ids:
                done.finish_reason = "eos"
    return completions


def cut(completions: Sequence[Completion], eos: Sequence[int]) -> list[Completion]:
    """What the completions, drawn without an EOS, would have been with `eos`."""
    result = []
    for completion in completions:
        size = next((i + 1 for i, token in enumerate(completion.token_ids) if token in eos), None)
        reason = "length" if size is None else "eos"
        result.append(Completion(completion.token_ids[:size], completion.logprobs[:size], reason))
    return result


def assert_same(got: Sequence[Completion], expected: Sequence[Completion], logprob_error: float = 1e-4) -> None:
    """Every token id and finish reason is the same, and the log-probs differ by rounding only."""
    assert [c.token_ids for c in got] == [c.token_ids for c in expected]
    assert [c.finish_reason for c in got] == [c.finish_reason for c in expected]
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(mine.logprobs), torch.tensor(theirs.logprobs), atol=logprob_error, rtol=0
        )


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokens of one to three letters, VOCAB of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["Ġ", *("".join(letters) for n in (1, 2, 3) for letters in itertools.product("abcd", repeat=n))]
    words += [f"<{i}>" for i in range(VOCAB - len(words))]
    merges = [(w[0], w[1:]) for w in words if set(w) <= set("abcd") and len(w) > 1]
    backend = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)
