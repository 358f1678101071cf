"""For maintainers: a GRPO run of an arithmetic policy on vLLM, and what its engine holds and draws afterwards.

python scripts/vllm_check.py --policy policies/small --json check.json [options of spec-rollout grpo]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from spec_rollout.backends.embedded import EmbeddedBackend
from spec_rollout.backends.vllm.backend import VLLMBackend
from spec_rollout.bench.workload import arithmetic_prompts, hardware, write_json
from spec_rollout.config import VERIFICATIONS, SpecConfig
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.gamma import FixedGamma
from spec_rollout.records import Completion, RolloutStats, SamplingParams
from spec_rollout.training import SpecGRPOConfig, SpecGRPOTrainer
from spec_rollout.training.launch import launch

PROMPTS, GAMMA = 48, 3
LOGGED = ("goodput", "mean_acceptance_length", "num_speculative_tokens", "draft_version", "draft_healthy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--json", type=Path)
    given, others = parser.parse_known_args()
    recipe = Path(__file__).parent.parent / "recipes" / "arithmetic_grpo_vllm.yaml"
    line = ["--config", str(recipe), "--model_name_or_path", given.policy, *others]
    trainer = launch(SpecGRPOTrainer, SpecGRPOConfig, line)
    steps = [entry for entry in trainer.state.log_history if "speculative/goodput" in entry]
    figures = {
        "steps": len(steps),
        **{name: [entry[f"speculative/{name}"] for entry in steps] for name in LOGGED},
        "reward": [entry["reward"] for entry in steps],
        "logp_difference_max": [entry["sampling/sampling_logp_difference/max"] for entry in steps],
        "after": after(trainer),
        "hardware": hardware(),
    }
    print(figures["after"])
    write_json(given.json, figures)


@torch.no_grad()
def after(trainer: SpecGRPOTrainer) -> dict:
    """Greedy completions with and without guesses, log-probs and acceptance, on the policy as it is now."""
    model, backend = trainer.model.eval(), trainer.sampler.backend
    backend.policy_version = trainer.state.global_step
    prompts = arithmetic_prompts(trainer.processing_class, PROMPTS)
    eos = (trainer.processing_class.eos_token_id,)
    greedy = SamplingParams(max_new_tokens=256, temperature=0, eos_token_ids=eos)
    sampled = SamplingParams(max_new_tokens=256, eos_token_ids=eos)
    expected = RolloutEngine(model, SpecConfig(max_slots=PROMPTS)).generate(prompts, greedy)
    found, stats = draw(backend, prompts, greedy, GAMMA)
    drawn, at_one = draw(backend, prompts, sampled, GAMMA)
    figures = {
        "greedy_tokens": sum(len(c.token_ids) for c in found),
        "greedy_rows_different": different(found, expected),
        "greedy_acceptance_length": stats.mean_acceptance_length,
        "acceptance_length": at_one.mean_acceptance_length,
        "max_logprob_error": max(map(logprob_error, [model] * PROMPTS, prompts, drawn)),
        "versions": backend.engine.versions(),
    }
    if backend.engine.live_schedule:
        figures["greedy_rows_different_from_vllm_without_guesses"] = different(
            found, draw(backend, prompts, greedy, 0)[0]
        )
    with TemporaryDirectory() as folder:
        backend.save(Path(folder, "draft"))
        for verification in VERIFICATIONS:
            config = SpecConfig(
                num_speculative_tokens=GAMMA,
                draft_model_path=str(Path(folder, "draft")),
                draft_refresh=False,
                draft_ngrams=False,
                max_slots=PROMPTS,
                verification=verification,
            )
            embedded = EmbeddedBackend(model, config, trainer.processing_class)
            embedded.generate(prompts, sampled)
            figures[f"acceptance_length_embedded_{verification}"] = embedded.take_stats().mean_acceptance_length
    return figures


def draw(
    backend: VLLMBackend, prompts: Sequence[list[int]], params: SamplingParams, gamma: int
) -> tuple[list[Completion], RolloutStats]:
    """A server guesses as it was started, whatever `gamma`."""
    backend.controller, backend._watchman = FixedGamma(gamma), None
    backend.take_stats()
    return backend.generate(prompts, params), backend.take_stats()


def different(found: Sequence[Completion], expected: Sequence[Completion]) -> int:
    return sum(a.token_ids != b.token_ids for a, b in zip(found, expected, strict=True))


def logprob_error(model: torch.nn.Module, prompt: list[int], completion: Completion) -> float:
    """Largest difference between vLLM's log-probs and the trainer's own, by a pass over the whole row."""
    ids = torch.tensor([prompt + completion.token_ids])
    logprobs = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    own = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
    return (own - torch.tensor(completion.logprobs)).abs().max().item()


if __name__ == "__main__":
    sys.exit(main())
