"""vLLM opens a hybrid policy that was saved here, with the MTP head beside it as its `mtp` draft."""

import copy
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.config import SpecConfig
from spec_rollout.draft.mtp_checkpoint import add_to_policy
from spec_rollout.draft.mtp_names import QWEN, appended
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import SamplingParams
from tests.backends.vllm.tiny import PROMPTS, ROWS, SIZES, needs_vllm
from tests.draft.test_mtp import random_head
from tests.tiny import make_policy

pytestmark = [needs_vllm, pytest.mark.usefixtures("patient_watchman", "generous")]
PARAMS = SamplingParams(max_new_tokens=32, temperature=0)
GUESSES = 3
SHAPE = {
    "layer_types": [*["linear_attention"] * 3, "full_attention"],  # sizes: the least that vLLM's CPU kernels take
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
}
EXPERTS = {"num_experts_per_tok": 4, "moe_intermediate_size": 32}  # all of them: a choice would jump with rounding


class Family(NamedTuple):
    """Tiny policies that vLLM opens: options of the configuration, their dtype there, and how large weights are."""

    shape: dict
    dtype: str = "bfloat16"  # of vLLM's delta rule on a CPU
    std: float = 0.35


FAMILIES = {
    "qwen3_5_text": Family(SHAPE),
    "qwen3_next": Family({**SHAPE, **EXPERTS}, std=0.1),
    "qwen3_5_moe_text": Family({**SHAPE, **EXPERTS}, std=0.1),
    "glm4_moe": Family({**EXPERTS, "num_experts_per_tok": 2}, dtype="float32"),
}

ANY_NAME = """
from unittest.mock import MagicMock


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()
"""


@pytest.fixture
def text_only(tmp_path, monkeypatch):
    """vLLM imports Qwen3.5 with torchvision only, also where it inspects models, in a process of its own. Text does
    not use it: one that has every name, and nothing behind it, does."""
    site = tmp_path / "site"
    for module in ("", "io", "transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional"):
        folder = site / "torchvision" / module.replace(".", "/")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text(ANY_NAME)
    (site / "torchvision-0.28.0.dist-info").mkdir()
    (site / "torchvision-0.28.0.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.28.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]))


def in_vllm(folder, dtype: str, expected: list[list[int]]) -> tuple[list[list[int]], float]:
    """Greedy completions, and the acceptance length over those prompts whose completions are as `expected`."""
    import vllm

    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    llm = vllm.LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype=dtype,
        max_num_seqs=ROWS,
        enforce_eager=True,
        disable_log_stats=False,
        enable_prefix_caching=False,
        speculative_config={"method": "mtp", "num_speculative_tokens": GUESSES},
    )
    sampling = vllm.SamplingParams(max_tokens=PARAMS.max_new_tokens, temperature=0, detokenize=False, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    before = counted(llm)
    llm.generate([{"prompt_token_ids": ids} for ids in alike(tokens, expected)], sampling)
    accepted, drafts = (after - b for after, b in zip(counted(llm), before, strict=True))
    return tokens, 1 + accepted / drafts


def counted(llm) -> tuple[int, int]:
    """Accepted guesses, and passes with guesses over all rows."""
    found = {m.name.removeprefix("vllm:spec_decode_num_"): m.value for m in llm.get_metrics() if hasattr(m, "value")}
    return found["accepted_tokens"], found["drafts"]


def alike(tokens: list[list[int]], others: list[list[int]]) -> list[list[int]]:
    """The prompts whose completions are the same."""
    return [prompt for prompt, a, b in zip(PROMPTS, tokens, others, strict=True) if a == b]


@torch.no_grad()
def gap(model, prompt, ours, theirs) -> float:
    """Between the two first tokens that differ, in float32, as a multiple of what bfloat16 errs by there."""
    place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    ids = torch.tensor([prompt + ours[:place]])
    exact = copy.deepcopy(model).float()(ids).logits[0, -1]
    error = (model(ids).logits[0, -1].float() - exact).abs().max()
    return float((exact[ours[place]] - exact[theirs[place]]).abs() / error)


def learned_by_heart(name, folder) -> None:
    """A policy in `folder` with an MTP head that has learned some of its greedy completions."""
    model = make_policy(name, std=FAMILIES[name].std, **SIZES, **FAMILIES[name].shape)
    model.save_pretrained(folder)
    names = QWEN if "qwen" in name else appended(SIZES["num_hidden_layers"])
    add_to_policy(folder, random_head(model, names).on_disk(torch.float32))
    backend = EmbeddedBackend(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        SpecConfig(num_speculative_tokens=GUESSES, draft_ngrams=False, draft_learning_rate=0.3),
    )
    for _ in range(3):
        backend.generate(PROMPTS, PARAMS)
        assert backend.refresh(1e9).steps > 0
    model.save_pretrained(folder)
    backend.save_with_policy(folder)


def our_length(model, prompts: list[list[int]], quirks: bool) -> float:
    """The acceptance length as vLLM counts it, which guesses nothing before the first token.

    With `quirks` like vLLM's MTP layer for GLM: it has no embedding at position 0, and a further guess reads the
    output before its norm. transformers' and SGLang's have neither.
    """
    backend = EmbeddedBackend(model, SpecConfig(num_speculative_tokens=GUESSES, draft_head="mtp", draft_ngrams=False))
    head = backend.drafter.head
    if quirks:
        head.norm, head.final_norm, read = head.final_norm, torch.nn.Identity(), head.read
        head.read = lambda embeds, hidden, place, *rest: read(embeds * (place > 0)[..., None], hidden, place, *rest)
    backend.generate(prompts, PARAMS)
    steps = [step for step in backend.stats.steps if step.gamma][1:]
    return 1 + sum(sum(step.accepted) for step in steps) / sum(step.rows for step in steps)


@pytest.mark.parametrize("name", FAMILIES)
def test_its_greedy_output_and_acceptance_are_ours(name, text_only, tmp_path):
    family, folder = FAMILIES[name], tmp_path / "policy"
    learned_by_heart(name, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, family.dtype)).eval()
    ours = [c.token_ids for c in RolloutEngine(model).generate(PROMPTS, PARAMS)]
    with ProcessPoolExecutor(1, get_context("spawn")) as apart:  # after a dense one, vLLM has no place for experts
        theirs, their_length = apart.submit(in_vllm, folder, family.dtype, ours).result()
    same = alike(ours, theirs)
    length = our_length(model, same, quirks=name == "glm4_moe")
    assert len(same) == len(PROMPTS) if family.dtype == "float32" else len(same) >= len(PROMPTS) / 2
    assert all(gap(model, *found) < 2 for found in zip(PROMPTS, ours, theirs, strict=True) if found[0] not in same)
    assert length > 1.3 and their_length == pytest.approx(length, rel=0.05)
