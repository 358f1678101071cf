"""What a vLLM that takes a policy and its MTP head while it runs does, beside one that was started with them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from spec_rollout.backends.vllm.backend import VLLMBackend
from spec_rollout.backends.vllm.colocated import Colocated
from spec_rollout.backends.vllm.engine import own_speculative_config
from spec_rollout.backends.vllm.steady import guesses_steadily
from spec_rollout.backends.vllm.worker import LiveWeights
from spec_rollout.config import SpecConfig
from spec_rollout.draft import refresh, watchman
from spec_rollout.draft.mtp import MtpHead
from spec_rollout.draft.mtp_checkpoint import add_to_policy, find_tensors
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.noise import request_keys
from spec_rollout.gamma import FixedGamma
from spec_rollout.records import RolloutStats, SamplingParams
from tests.backends.vllm.test_mtp import FAMILIES, GUESSES, learned_by_heart
from tests.backends.vllm.tiny import PROMPTS, ROWS, start_llm, starter, teach

GREEDY = SamplingParams(max_new_tokens=32, temperature=0)
WARM = SamplingParams(max_new_tokens=32)
SEED = (5,)


class Drawn(NamedTuple):
    """Completions, their log-probs, and how many tokens a guessing step emitted for a row."""

    ids: list[list[int]]
    logprobs: list[list[float]]
    length: float


class Found(NamedTuple):
    first: Drawn
    crowded: Drawn
    moved: Drawn
    warm: Drawn
    numbers: set[int]
    lost: tuple[list[str], bool, list[list[int]]]
    learned: Drawn


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def head_in(folder: Path, model: PreTrainedModel) -> MtpHead:
    return MtpHead.of(model, find_tensors(str(folder), model), folder)


@torch.no_grad()
def save_moved(folder: Path, moved: Path) -> None:
    """The policy and the head of `folder`, every weight a little elsewhere."""
    torch.manual_seed(0)
    model = load(folder)
    head = head_in(folder, model)
    for part in (model, head):
        for weight in part.parameters():
            weight.add_(0.01 * weight.abs().mean() * torch.randn(weight.shape))
    model.save_pretrained(moved)
    add_to_policy(moved, head.on_disk(torch.float32))


def drawn(completions: Sequence, stats: RolloutStats) -> Drawn:
    return Drawn(
        [c.token_ids for c in completions], [c.logprobs for c in completions], stats.mean_acceptance_length or 1.0
    )


def pushed(name: str, folder: Path, moved: Path) -> Found:
    """In a process of its own: a vLLM that was started with the policy in `folder`, and given the one in `moved`."""
    watchman.WATCHED, refresh.MAX_EPOCHS = 10**9, 20
    model = load(folder)
    config = SpecConfig(
        rollout_backend="vllm", max_slots=ROWS, num_speculative_tokens=GUESSES, draft_learning_rate=0.3
    )
    backend = VLLMBackend(model, config, starter(model, FAMILIES[name].dtype))

    def draw(prompts=PROMPTS, params=GREEDY) -> Drawn:
        backend.take_stats()
        return drawn(backend.generate(prompts, params, seed=SEED), backend.take_stats())

    first, crowded = draw(), draw(PROMPTS * 2)  # more than there are rows: some read prompts while others guess
    model.load_state_dict(load(moved).state_dict())
    other = head_in(moved, model).state_dict()
    for head in (backend.learner.head, backend.learner.trainer.head):
        head.load_state_dict(other)
    backend.policy_version += 1
    greedy = draw()
    backend.take_stats()
    warm = backend.generate(PROMPTS, WARM, seed=SEED)
    stats = backend.take_stats()
    lost = lose(backend, draw)
    teach(backend, rounds=3)
    numbers = {step.gamma for step in stats.steps if step.accepted}
    return Found(first, crowded, greedy, drawn(warm, stats), numbers, lost, draw())


def lose(backend: VLLMBackend, draw) -> tuple[list[str], bool, list[list[int]]]:
    """A head that does not arrive: what is said of it, whether it is taken for one that did, and what is drawn."""
    mlp, load = backend.learner.head.layers[0].mlp, LiveWeights._load_draft
    weight = mlp.experts.down_proj if hasattr(mlp, "experts") else mlp.down_proj.weight
    with torch.no_grad():
        weight.mul_(1.05)
    backend.policy_version += 1
    LiveWeights._load_draft = lambda self, tensors: None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ids = draw().ids
    LiveWeights._load_draft, healthy = load, backend.draft_healthy
    with torch.no_grad():
        weight.div_(1.05)
    backend.policy_version += 1
    return [str(warning.message) for warning in told], healthy, ids


def started(name: str, folder: Path) -> tuple[Drawn, Drawn]:
    """In a process of its own: what a vLLM draws that was started with the policy in `folder`, and pushed nothing."""
    model = load(folder)
    speculative = own_speculative_config(GUESSES, ROWS, steady="qwen" in name)
    engine = Colocated(start_llm(model, speculative, FAMILIES[name].dtype), dict, verification="coupled")
    engine.verification = engine._call("live_verify", "coupled")
    assert engine.live_schedule != guesses_steadily(speculative)
    engine.control(FixedGamma(GUESSES))
    keys = request_keys(SEED, len(PROMPTS))
    found = []
    for params in (GREEDY, WARM):
        rows = engine.generate(PROMPTS, params, keys=keys)
        found.append(drawn(rows, RolloutStats(engine.take_steps()[0], 0.0)))
    return found[0], found[1]


def check(name: str, tmp_path: Path) -> None:
    family, folder, moved = FAMILIES[name], tmp_path / "policy", tmp_path / "moved"
    learned_by_heart(name, folder)
    save_moved(folder, moved)
    with ProcessPoolExecutor(2, get_context("spawn")) as apart:  # one process takes one kind of policy
        ours, theirs = apart.submit(pushed, name, folder, moved), apart.submit(started, name, moved)
        found, (greedy, warm) = ours.result(), theirs.result()
    assert found.moved.ids == greedy.ids and found.warm.ids == warm.ids
    assert found.moved.logprobs == greedy.logprobs and found.warm.logprobs == warm.logprobs
    assert found.moved.length == greedy.length and found.warm.length == warm.length > 1
    assert found.numbers == {GUESSES}
    assert found.first.length > 1.3 and found.learned.length > 1.3
    messages, healthy, ids = found.lost
    assert any("what was pushed did not arrive" in message for message in messages) and not healthy
    assert ids == found.moved.ids == found.learned.ids
    assert found.crowded.ids == found.first.ids * 2
    if family.dtype == "float32":
        assert found.first.ids == [c.token_ids for c in RolloutEngine(load(folder)).generate(PROMPTS, GREEDY)]
        assert warm.ids == [c.token_ids for c in RolloutEngine(load(moved)).generate(PROMPTS, WARM, seed=SEED)]
        return
    for where, theirs in ((folder, found.first), (moved, greedy)):
        rounded = RolloutEngine(load(where, getattr(torch, family.dtype))).generate(PROMPTS, GREEDY)
        ours = drawn(rounded, RolloutStats())
        assert sum(map(list.__eq__, ours.ids, theirs.ids)) >= len(PROMPTS) / 4
        exact = load(where)
        assert rounding(exact, theirs) < 1.5 * rounding(exact, ours)


@torch.no_grad()
def rounding(exact: PreTrainedModel, given: Drawn) -> float:
    """How far log-probs are from those of the policy in float32, on average."""
    errors = []
    for prompt, ids, logprobs in zip(PROMPTS, given.ids, given.logprobs, strict=True):
        scores = exact(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        errors.append((scores.gather(1, torch.tensor(ids)[:, None])[:, 0] - torch.tensor(logprobs)).abs())
    return float(torch.cat(errors).mean())
