"""The reference policy: an ordinary Hugging Face folder, the same for the same seed, whole or not there."""

import itertools
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.config import SpecConfig
from spec_rollout.draft.mtp import MtpHead
from spec_rollout.draft.mtp_checkpoint import FILE
from spec_rollout.draft.references import OracleDrafter
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.records import SamplingParams
from spec_rollout.tasks import reference_mtp, reference_policy
from spec_rollout.tasks.arithmetic import FULL_SENTENCES, VARIED, problems
from spec_rollout.tasks.reference_policy import RECIPES, make_model, make_reference_policy, make_tokenizer


@pytest.fixture
def short_training(monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", replace(RECIPES["tiny"], num_layers=2, num_problems=24, batch_size=2))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("style", [VARIED, FULL_SENTENCES], ids=["varied", "full_sentences"])
def test_tokenizer_returns_what_it_was_given(style):
    tokenizer = make_tokenizer(style)
    for problem in problems("heldout", 200, style=style):
        text = problem.prompt + problem.solution
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    odd = " two  spaces\n\n\ttab, Ünïcode 漢字 🙂 ."
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd


def test_tokenizer_is_deterministic_and_small(tokenizer):
    assert make_tokenizer().get_vocab() == tokenizer.get_vocab()
    assert 300 <= len(tokenizer) <= 512
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_prompt_and_solution_tokenize_apart(tokenizer):
    """A completion continues the ids of its prompt: no token straddles the two."""
    for problem in problems("heldout", 100):
        whole = tokenizer(problem.prompt + problem.solution)["input_ids"]
        assert whole == tokenizer(problem.prompt)["input_ids"] + tokenizer(problem.solution)["input_ids"]


@pytest.mark.parametrize(("size", "low", "high"), [("demo", 0.5e6, 2e6), ("tiny", 0.5e6, 1.5e6), ("small", 5e6, 15e6)])
def test_sizes(tokenizer, size, low, high):
    assert low < make_model(RECIPES[size], tokenizer).num_parameters() < high


def test_folder_is_an_ordinary_policy_and_the_same_for_a_seed(short_training, tmp_path):
    first = make_reference_policy(tmp_path / "first", "tiny", seed=1)
    again = make_reference_policy(tmp_path / "again", "tiny", seed=1)
    other = make_reference_policy(tmp_path / "other", "tiny", seed=2)
    assert {p.name for p in tmp_path.iterdir()} == {"first", "again", "other"}
    assert {p.name for p in first.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, again, other)]
    assert weights[0] == weights[1] != weights[2]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(first), AutoTokenizer.from_pretrained(first)
    assert model.dtype == torch.float32
    ends = model.generation_config.eos_token_id  # a list or one id, as the version of transformers has it
    assert ends in (tokenizer.eos_token_id, [tokenizer.eos_token_id]) and model.config.use_cache
    assert len(tokenizer) == model.config.vocab_size


def test_a_hybrid_has_an_mtp_head_that_guesses_in_the_first_rollout(monkeypatch, tmp_path):
    recipe = replace(RECIPES["tiny"], num_layers=4, hidden_size=64, num_heads=2, intermediate_size=128)
    monkeypatch.setitem(RECIPES, "tiny", replace(recipe, num_problems=96, batch_size=2))
    monkeypatch.setattr(reference_mtp, "STEPS", 20)
    folder = make_reference_policy(tmp_path / "policy", "tiny", architecture="qwen3_5")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.layer_types.count("linear_attention") == 3 and (folder / FILE).exists()
    backend = EmbeddedBackend(model, SpecConfig(num_speculative_tokens=3, draft_ngrams=False), tokenizer)
    prompts = [tokenizer(p.prompt)["input_ids"] for p in problems("heldout", 4)]
    backend.generate(prompts, SamplingParams(max_new_tokens=24))
    first = backend.take_stats()
    assert isinstance(backend.learner.head, MtpHead) and first.mean_acceptance_length > 1.5
    random = MtpHead(model)
    random.fc.weight.data.normal_()
    backend.drafter.head.load_state_dict(random.state_dict())
    backend.generate(prompts, SamplingParams(max_new_tokens=24))
    assert first.mean_acceptance_length > backend.take_stats().mean_acceptance_length + 0.3  # it has learned


def test_a_policy_of_experts(short_training, tmp_path):
    folder = make_reference_policy(tmp_path / "policy", "tiny", architecture="qwen3_moe")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.num_experts == 16 and not model.config.output_router_logits
    prompts = [tokenizer(p.prompt)["input_ids"] for p in problems("heldout", 4)]
    expected = RolloutEngine(model).generate(prompts, SamplingParams(max_new_tokens=12))
    guessing = RolloutEngine(model, SpecConfig(num_speculative_tokens=3), drafter=OracleDrafter(expected))
    found = guessing.generate(prompts, SamplingParams(max_new_tokens=12))
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert guessing.stats.mean_acceptance_length == 4 == 12 / 3


def test_single_rows_are_the_problems(tokenizer):
    recipe = replace(RECIPES["tiny"], num_problems=40)
    rows = reference_policy.single_rows(tokenizer, recipe, seed=0)
    for row, problem in zip(rows, problems("sft", 40), strict=True):
        assert tokenizer.decode(row["input_ids"]) == problem.prompt + problem.solution + tokenizer.eos_token
        assert tokenizer.decode([t for t in row["labels"] if t != -100]) == problem.solution + tokenizer.eos_token


@torch.no_grad()
def test_packed_problems_do_not_see_each_other(tokenizer):
    """A row of training data gives each problem the logits that it has alone."""
    model = make_model(replace(RECIPES["tiny"], num_layers=2), tokenizer).eval()
    row = reference_policy.packed_rows(tokenizer, replace(RECIPES["tiny"], num_problems=12), seed=0)[0]
    ids, positions = torch.tensor([row["input_ids"]]), torch.tensor([row["position_ids"]])
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    starts = [*(positions[0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
    assert len(starts) > 3
    for first, last in itertools.pairwise(starts):
        torch.testing.assert_close(packed[first:last], model(ids[:, first:last]).logits[0], atol=1e-4, rtol=1e-4)
        labels = [label for label in row["labels"][first:last] if label != -100]
        assert labels and row["input_ids"][first:last][-len(labels) :] == labels


def test_the_training_says_what_it_is(short_training, tmp_path, capsys):
    make_reference_policy(tmp_path / "policy", "tiny")
    shown = capsys.readouterr()
    assert "training the policy: 100%" in shown.err and "loss=" in shown.err and not shown.out


def test_an_interrupted_training_leaves_nothing(monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reference_policy, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_reference_policy(tmp_path / "policy", "tiny")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not an empty folder: remove it"):
        make_reference_policy(tmp_path, "tiny")


def test_an_unknown_size_or_architecture_is_named(tmp_path):
    with pytest.raises(ValueError, match="size='huge' is unknown: choose one of demo, tiny, deep, small, base"):
        make_reference_policy(tmp_path / "policy", "huge")
    with pytest.raises(ValueError, match="architecture='gpt2' is unknown: choose one of qwen3, qwen3_5"):
        make_reference_policy(tmp_path / "policy", architecture="gpt2")
