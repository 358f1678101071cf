"""vLLM opens a hybrid policy that was saved here, with the MTP head beside it as its `mtp` draft."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.config import SpecConfig
from spec_rollout.draft.mtp_checkpoint import add_to_policy
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import SamplingParams
from tests.backends.vllm.tiny import PROMPTS, ROWS, SIZES, needs_vllm
from tests.draft.test_mtp import random_head
from tests.tiny import make_policy

pytestmark = [needs_vllm, pytest.mark.usefixtures("patient_watchman", "generous")]
PARAMS = SamplingParams(max_new_tokens=32, temperature=0)
BFLOAT16 = 2**-8
SHAPE = {
    "layer_types": [*["linear_attention"] * 3, "full_attention"],  # sizes: the least that vLLM's CPU kernels take
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
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


def in_vllm(folder, guesses: int) -> tuple[list[list[int]], float]:
    """Greedy completions and the acceptance length."""
    import vllm

    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    llm = vllm.LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",  # of vLLM's delta rule on a CPU
        max_num_seqs=ROWS,
        enforce_eager=True,
        disable_log_stats=False,
        enable_prefix_caching=False,
        speculative_config={"method": "mtp", "num_speculative_tokens": guesses},
    )
    sampling = vllm.SamplingParams(max_tokens=PARAMS.max_new_tokens, temperature=0, detokenize=False, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling)
    counted = {m.name.removeprefix("vllm:spec_decode_num_"): m.value for m in llm.get_metrics() if hasattr(m, "value")}
    return [list(o.outputs[0].token_ids) for o in outputs], 1 + counted["accepted_tokens"] / counted["drafts"]


@torch.no_grad()
def gap(model, prompt, ours, theirs) -> float:
    """Between the two first tokens that differ, in roundings of bfloat16."""
    place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    logits = model(torch.tensor([prompt + ours[:place]])).logits[0, -1].float()
    return float((logits[ours[place]] - logits[theirs[place]]).abs() / (BFLOAT16 * logits.abs().max()))


def test_its_greedy_output_and_acceptance_are_ours(text_only, tmp_path):
    folder = tmp_path / "policy"
    model = make_policy("qwen3_5_text", **SIZES, **SHAPE)
    model.save_pretrained(folder)
    add_to_policy(folder, random_head(model).on_disk(torch.float32))
    backend = EmbeddedBackend(
        AutoModelForCausalLM.from_pretrained(folder).eval(), SpecConfig(num_speculative_tokens=3)
    )
    for _ in range(6):
        backend.generate(PROMPTS, PARAMS)
        assert backend.refresh(1e9).steps > 0
    model.save_pretrained(folder)
    backend.save_with_policy(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    backend = EmbeddedBackend(model, SpecConfig(num_speculative_tokens=3, draft_head="mtp", draft_ngrams=False))
    backend.generate(PROMPTS, PARAMS)
    ours = [c.token_ids for c in RolloutEngine(model).generate(PROMPTS, PARAMS)]
    theirs, length = in_vllm(folder, guesses=3)
    pairs = list(zip(PROMPTS, ours, theirs, strict=True))
    assert sum(a == b for _, a, b in pairs) > len(pairs) / 2
    assert all(gap(model, prompt, a, b) < 4 for prompt, a, b in pairs if a != b)
    assert backend.stats.mean_acceptance_length > 1.5
    assert length == pytest.approx(backend.stats.mean_acceptance_length, rel=0.1)
